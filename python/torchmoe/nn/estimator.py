"""Gradient estimators: how a layer chooses, weighs and combines, and what its router learns from.

The choice of experts is an integer and has no gradient. An estimator says what to use instead. It
is one small module with three methods, each with a default, which `MoE.forward` calls in this
order:

    select(logits)                                  -> indices [T, K]  override to sample
    weigh(logits, indices)                          -> weights [T, K]  override for a gate rule
    combine(x, logits, indices, weights, experts)   -> y [T, H]        override to use experts
                                                                       that were not chosen
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchmoe import ops
from torchmoe.nn._checks import check_choice

#: What a layer computes its experts with: (x [T, H], indices [T, K], weights [T, K]) -> y [T, H].
ExpertFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class Estimator(nn.Module):
    """Base class of the gradient estimators; as it stands, the exact derivative of the weights.

    A layer sets the attributes below through `bind` before it first calls one of the methods. An
    estimator of your own overrides what differs:

        class Temperature(Estimator):
            def weigh(self, logits, indices):
                return super().weigh(logits / 2.0, indices)

        moe = MoE(64, 128, 8, 2, gate=Gate(estimator=Temperature()))

    One with state keeps it in buffers, registered in `bind`, and changes them in `update` only:
    forward passes are repeated by activation checkpointing and gradient accumulation, updates are
    not.

    Attributes:
        top_k: K.
        num_experts: E.
        hidden_size: H.
        score_function: the gate's score function.
        normalize: the gate's normalisation, or `default_normalize()` where it leaves the choice.
        gate_estimator: the gradient that `weigh` asks `torchmoe.ops.gate_weights` for.
    """

    top_k: int
    num_experts: int
    hidden_size: int
    score_function: str
    normalize: str
    gate_estimator: str = "exact"
    _layer: dict[str, Any] | None = None  # what bind was told

    def bind(
        self,
        *,
        top_k: int,
        num_experts: int,
        hidden_size: int,
        score_function: str,
        normalize: str | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Tells the estimator about the layer it belongs to; `MoE` calls it once, when it is built.

        Override it to register parameters and buffers, after `super().bind(...)`, on the given
        device and dtype.

        Args:
            top_k: K.
            num_experts: E.
            hidden_size: H.
            score_function: "softmax" or "sigmoid".
            normalize: "none", "topk", "uniform", or None for `default_normalize()`.
            device: where the layer's parameters are.
            dtype: the dtype of the layer's parameters.

        Raises:
            ValueError: the estimator belongs to a layer of another kind already.
        """
        del device, dtype  # for subclasses
        layer = {
            "top_k": top_k,
            "num_experts": num_experts,
            "hidden_size": hidden_size,
            "score_function": score_function,
            "normalize": normalize,
        }
        if self._layer not in (None, layer):
            raise ValueError(
                "MoE: gate.estimator must be an instance of its own for a layer of another kind, "
                f"got one bound to {self._layer} for {layer}"
            )
        self._layer = layer
        self.top_k = top_k
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.score_function = score_function
        self.normalize = self.default_normalize() if normalize is None else normalize

    def default_normalize(self) -> str:
        """The normalisation where the gate leaves the choice.

        "topk", but "none" for top_k = 1, whose "topk" weight is always 1.
        """
        return "topk" if self.top_k > 1 else "none"

    def select(
        self,
        logits: Tensor,
        *,
        selection_bias: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Chooses the experts.

        One that samples overrides this and draws its noise from torch's default generator.

        Args:
            logits: [T, E].
            selection_bias: [E]; with one the ranking is by score_function(logits) + selection_bias,
                else by logits.
            token_mask: [T] bool; a token where it is False must get -1 in every slot.

        Returns:
            indices [T, K] int64, best first; -1 = not routed.
        """
        scores = logits.detach()
        if selection_bias is not None:
            softmax = self.score_function == "softmax"
            scores = scores.softmax(dim=-1) if softmax else scores.sigmoid()
        return ops.select_experts(
            scores, self.top_k, selection_bias=selection_bias, token_mask=token_mask
        )

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        """The combine weight of each slot, differentiable in logits.

        Args:
            logits: [T, E].
            indices: [T, K] as selected: rerouted ids already replaced, dropped ones not yet removed
                (unless Capacity.normalize is "after_drop").

        Returns:
            weights [T, K].
        """
        return ops.gate_weights(
            logits,
            indices,
            score_function=self.score_function,
            normalize=self.normalize,
            estimator=self.gate_estimator,
        )

    def combine(
        self,
        x: Tensor,
        logits: Tensor,
        indices: Tensor,
        weights: Tensor,
        experts: ExpertFunction,
        *,
        token_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The layer's output from its experts.

        A masked token must get y = 0 and give the router no gradient.

        Args:
            x: [T, H].
            logits: [T, E].
            indices: [T, K] as routed; -1 = not routed.
            weights: [T, K].
            experts: the layer's experts, called as experts(x, indices, weights) -> y [T, H].
            token_mask: [T] bool, True = the token counts.

        Returns:
            y [T, H]; or y and statistics for `update`: a tensor, or tuples, lists and dicts of
            tensors, that add up over micro-batches and processes (sums and counts, not means).
        """
        del logits, token_mask  # for subclasses
        return experts(x, indices, weights)

    def update(self, statistics: Any) -> None:  # noqa: ANN401 (subclasses say which)
        """Changes the estimator's buffers, once per optimizer step.

        `MoE.update` calls it, without gradients.

        Args:
            statistics: what `combine` returned, summed over the micro-batches and the process
                group; None if it returned none.
        """

    def reset_parameters(self) -> None:
        """Gives parameters and buffers their first values again; for subclasses that have some."""

    def extra_repr(self) -> str:
        """The gate's settings, once the estimator belongs to a layer."""
        if self._layer is None:
            return ""
        return f"score_function={self.score_function!r}, normalize={self.normalize!r}"


class Exact(Estimator):
    """The derivative of the weights as they are, at a fixed choice of experts."""


class StraightThrough(Estimator):
    """Selection and normalisation count as the identity (Bengio et al., arXiv 1308.3432).

    The formula is that of `torchmoe.ops.gate_weights`.
    """

    gate_estimator = "straight_through"


_REGISTRY: dict[str, Callable[[], Estimator]] = {
    "exact": Exact,
    "straight_through": StraightThrough,
}


def known_estimators() -> tuple[str, ...]:
    """The registered names."""
    return tuple(_REGISTRY)


def register_estimator(name: str, factory: Callable[[], Estimator]) -> None:
    """Makes Gate(estimator=name) build its estimator with factory(), a new one for each layer.

    Raises:
        ValueError: the name is taken.
    """
    if name in _REGISTRY:
        raise ValueError(f'register_estimator: name must be new, got "{name}"')
    _REGISTRY[name] = factory


def build_estimator(estimator: str | Estimator) -> Estimator:
    """A new estimator for a registered name; an instance is used as it is."""
    if isinstance(estimator, Estimator):
        return estimator
    check_choice("Gate", "estimator", estimator, _REGISTRY)
    return _REGISTRY[estimator]()
