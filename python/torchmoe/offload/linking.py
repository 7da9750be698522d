"""Predicting what the next layer needs: its router looks at this layer's tokens."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from torchmoe import ops
from torchmoe._checks import shown
from torchmoe.nn import MoE
from torchmoe.nn._layers import moe_layers
from torchmoe.nn._part import evaluating
from torchmoe.nn.declarations import declared_by_router
from torchmoe.nn.estimators.estimator import Estimator
from torchmoe.nn.routers.context_router import ContextRouter, route
from torchmoe.offload.experts import OffloadedExperts


def link(layers: Iterable[nn.Module]) -> None:
    """Lets each layer with offloaded experts ask for the experts of the next one.

        torchmoe.offload.link(model.layers)

    When a layer's experts are called, the next layer's router scores this layer's tokens, as in
    evaluation: without noise and without drawing a random number. What it would choose is read
    behind what the call itself needs, and nothing that the call needs is evicted for it. In the
    backward direction the experts of the layer before are known and are read ahead. A wrong
    prediction costs a read and never changes a result; `prediction_hit_rate` tells how good they
    are. The layers share one thread that reads. On a CUDA device each prediction waits for it once.

    Layers whose experts are not offloaded are passed over, so that one layer may predict for the
    second next. A layer whose experts were made with prefetch=False is not predicted for. Calling
    it again replaces the links of the layers; a deep copy has none.

    Args:
        layers: MoE layers, or modules that hold some, in the order in which the model runs them.

    Raises:
        TypeError: layers are no modules.
        ValueError: a layer appears twice, its hidden size or device is another one than that of the
            layer before, or its router does not score tokens one by one from x alone.
    """
    found = _layers(layers)
    for before, after in pairwise(found):
        if before.hidden_size != after.hidden_size:
            raise ValueError(
                f"link: layers must have one hidden_size, got {before.hidden_size} and "
                f"{after.hidden_size}"
            )
    experts = [cast(OffloadedExperts, layer.experts) for layer in found]
    for first, second in pairwise(experts):
        if first.device != second.device:
            raise ValueError(
                f"link: layers must be on one device, got {first.device} and {second.device}"
            )
    for layer in found[1:]:
        router = declared_by_router(layer.router)
        if isinstance(router, ContextRouter) or router.chooses:
            raise ValueError(
                "link: layers must have routers that score each token from x alone, "
                f"got {type(router).__name__}"
            )
    for part in experts:
        part._stream.ahead = part._stream.behind = part._stream.predict = None
        # Reads that two threads do at once would come in no order.
        part._residents.loader = experts[0]._residents.loader
    for before, after in pairwise(found):
        source = cast(OffloadedExperts, before.experts)
        target = cast(OffloadedExperts, after.experts)
        if target.prefetch:
            source._stream.ahead = weakref.ref(target._stream)
            source._stream.predict = _Predict(after)
        if source.prefetch:
            target._stream.behind = weakref.ref(source._stream)


def _layers(given: Iterable[nn.Module]) -> list[MoE]:
    """The layers with offloaded experts, in order."""
    if not isinstance(given, Iterable) or isinstance(given, str | Tensor):
        raise TypeError(f"link: layers must be modules, got {shown(given)}")
    found: list[MoE] = []
    for module in given:
        if not isinstance(module, nn.Module):
            raise TypeError(f"link: layers must be modules, got {shown(module)}")
        for layer in moe_layers(module).values():
            if any(layer.experts is other.experts for other in found):
                raise ValueError("link: layers must have experts of their own, got the same twice")
            if isinstance(layer.experts, OffloadedExperts):
                found.append(layer)
    return found


class _Predict:
    """What a layer would choose for the tokens of another one.

    Args:
        layer: the one that chooses; it lives as long as without this.
    """

    def __init__(self, layer: MoE) -> None:
        self._layer = weakref.ref(layer)

    @torch.no_grad()
    def __call__(self, x: Tensor, indices: Tensor) -> Mapping[int, int]:
        """How many slots each expert would have that is chosen.

        Args:
            x: [T, H].
            indices: [T, K] of the other layer; a token without a routed slot does not count.
        """
        layer = self._layer()
        if layer is None:
            return {}
        experts = layer.num_experts
        mask = ((indices >= 0) & (indices < experts)).any(dim=1)
        with evaluating(layer.router):
            try:
                logits = route(layer.router, x, experts).logits
            except RuntimeError as error:
                raise RuntimeError(
                    "link: layers must have routers that score each token from x alone, "
                    f"got an error of {type(layer.router).__name__}"
                ) from error
        # The base class chooses by rank where the estimator would draw.
        chosen = Estimator.select(
            layer.estimator, logits, selection_bias=layer.selection_bias, token_mask=mask
        )
        counts = ops.dispatch_plan(chosen, experts).expert_offsets.diff().tolist()
        return {expert: count for expert, count in enumerate(counts) if count > 0}
