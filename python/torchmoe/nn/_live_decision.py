"""What a layer's router would choose for gate inputs, and whether that may have changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from torchmoe._wide import wide
from torchmoe.nn._decision import select, weigh
from torchmoe.nn._part import evaluating
from torchmoe.nn._sharding import is_sharded
from torchmoe.nn.routers.context_router import RouterOutput, score, scoring_of

if TYPE_CHECKING:
    from torchmoe.nn.moe import MoE


class LiveDecision:
    """A layer's decision for gate inputs, without the noise that its router adds in training.

    Attributes:
        top_k: K.
        num_experts: E.
    """

    def __init__(self, layer: MoE) -> None:
        self._layer = layer
        self.top_k, self.num_experts = layer.top_k, layer.num_experts

    def of(self, gate_input: Tensor) -> tuple[Tensor, Tensor]:
        """The ids and weights [N, K] that the layer gives to gate inputs [N, G]."""
        layer = self._layer
        with torch.no_grad(), evaluating(layer.router), evaluating(layer.estimator):
            scored = score(cast(nn.Module, scoring_of(layer.router)), gate_input)
            logits = wide(scored.logits)
            ids = select(layer, RouterOutput(logits), None)
            return ids, weigh(layer, logits, ids)

    def tensors(self) -> list[Tensor]:
        """Whatever decides.

        Raises:
            RuntimeError: one of them is sharded.
        """
        layer = self._layer
        held = [*layer.router.parameters(), *layer.router.buffers()]
        held += [*layer.estimator.parameters(), *layer.estimator.buffers()]
        held += [] if layer.selection_bias is None else [layer.selection_bias]
        if any(is_sharded(tensor) for tensor in held):
            raise RuntimeError("RoutingCache: router must not be sharded, got a DTensor")
        return [tensor.detach() for tensor in held]

    def settings(self) -> tuple[object, ...]:
        """What decides and is no tensor: the gate's settings, and the type that autocast casts to.

        The groups of experts are among them.
        """
        estimator = self._layer.estimator
        cast_to = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        groups = estimator.num_groups, estimator.top_groups
        return estimator.score_function, estimator.normalize, *groups, cast_to

    def snapshot(self) -> Snapshot:
        """A copy of what decides."""
        return Snapshot([tensor.clone() for tensor in self.tensors()], self.settings())


class Snapshot:
    """A copy of what decided.

    Counters of versions would not do: they pass over what is written through `.data`.

    Attributes:
        tensors: the copies.
    """

    def __init__(self, tensors: list[Tensor], settings: tuple[object, ...]) -> None:
        self.tensors = tensors
        self._settings = settings

    def is_of(self, live: LiveDecision) -> bool:
        """Whether everything is as it was; False where one is not a number."""
        now = live.tensors()
        return (
            self._settings == live.settings()
            and len(now) == len(self.tensors)
            and all(map(_is_same, now, self.tensors))
        )


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
