"""Gradient estimators: how a layer chooses, weighs and combines, and what its router learns from.

The choice of experts is an integer and has no gradient. An estimator defines what to use instead.
It is a small module; `MoE.forward` calls three of its methods in this order:

    select(logits)                                  -> indices [T, K]  override to sample
    weigh(logits, indices)                          -> weights [T, K]  override for a gate rule
    combine(x, logits, indices, weights, experts)   -> y [T, H]        override to use experts
                                                                       that were not chosen

All that a layer asks of it, each with a default:

    when it is made   bind, and what the class declares: score_functions, normalizes, takes_groups,
                      takes_selection_bias, draws, takes_experts_alone, fills_slots, refusal
    forward           select, weigh, combine; rank and tie_break if slots are rerouted;
                      has_constant_weights if the router is frozen
    once per step     update
    by the user       reset_parameters, and what bind was told: score_function, normalize, top_k,
                      num_experts, num_groups

The rest helps subclasses (probs, default_normalize, gate_estimator, settings) and their tests
(surrogate).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchmoe import ops
from torchmoe._checks import Fixed, check_output
from torchmoe.nn._part import Part
from torchmoe.nn.estimators._groups import limit_to_groups
from torchmoe.ops import NORMALIZES, SCORE_FUNCTIONS

#: What a layer computes its experts with: (x [T, H], indices [T, K], weights [T, K]) -> y [T, H].
ExpertFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def call_experts(experts: ExpertFunction, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """What the experts return, which must be like x; see `torchmoe._checks.check_output`."""
    return check_output(
        "MoE",
        "experts",
        experts(x, indices, weights),
        (x.shape[0], x.shape[1]),
        "[num_tokens, hidden_size]",
        x.device,
    )


class Estimator(Part):
    """Base class of the gradient estimators; by itself it is the exact derivative of the weights.

    A layer sets the attributes below through `bind` before it calls any of the methods. Your own
    estimator overrides what differs:

        class Temperature(Estimator):
            def weigh(self, logits, indices):
                return super().weigh(logits / 2.0, indices)

        moe = MoE(64, 128, 8, 2, gate=Gate(estimator=Temperature()))

    An estimator with state keeps it in buffers, registered in `bind`, and changes them in `update`
    only: activation checkpointing and gradient accumulation repeat forward passes, but not updates.

    Attributes:
        top_k: K.
        num_experts: E.
        hidden_size: H.
        score_function: the gate's score function.
        normalize: the gate's normalisation, or `default_normalize()` if the gate sets none.
        num_groups: the gate's number of groups of experts.
        top_groups: how many of them a token chooses from.
        gate_estimator: the gradient that `weigh` requests from `torchmoe.ops.gate_weights`.
        score_functions: the score functions that the estimator is defined for.
        normalizes: the normalisations that it is defined for.
        takes_groups: whether its selection respects the gate's groups.
        takes_selection_bias: whether its selection respects a selection bias.
        fills_slots: whether its selection gives every token that counts top_k experts.
        draws: whether its selection is random for each token, or needs random draws.
        takes_experts_alone: whether `combine` needs the output of each expert alone.
        refusal: why it is not defined for the others; ends the requirement in that error message.
        settings: the names of its own attributes that repr shows.
    """

    top_k = Fixed[int]()
    num_experts = Fixed[int]()
    hidden_size = Fixed[int]()
    score_function = Fixed[str]()
    normalize = Fixed[str]()
    num_groups = Fixed[int]()
    top_groups = Fixed[int]()
    gate_estimator: str = "exact"
    score_functions: tuple[str, ...] = SCORE_FUNCTIONS
    normalizes: tuple[str, ...] = NORMALIZES
    takes_groups: bool = True
    takes_selection_bias: bool = True
    fills_slots: bool = True
    draws: bool = False
    takes_experts_alone: bool = False
    refusal: str = ""
    settings: tuple[str, ...] = ()
    _layer: dict[str, Any] | None = None  # what bind was told

    def bind(
        self,
        *,
        top_k: int,
        num_experts: int,
        hidden_size: int,
        score_function: str,
        normalize: str | None,
        num_groups: int = 1,
        top_groups: int = 1,
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
            num_groups: groups of experts, a divisor of num_experts.
            top_groups: groups that a token chooses from; they hold at least top_k experts.
            device: where the layer's parameters are.
            dtype: the dtype of the layer's parameters.

        Raises:
            ValueError: the estimator is not defined for this gate, or belongs to a layer of another
                kind already.
        """
        del device, dtype  # for subclasses
        layer = {
            "top_k": top_k,
            "num_experts": num_experts,
            "hidden_size": hidden_size,
            "score_function": score_function,
            "normalize": normalize,
            "num_groups": num_groups,
            "top_groups": top_groups,
        }
        if self._layer not in (None, layer):
            raise ValueError(
                "MoE: gate.estimator must be an instance of its own for a layer of another kind, "
                f"got one bound to {self._layer} for {layer}"
            )
        self._check_defined("score_function", score_function, self.score_functions)
        if normalize is not None:
            self._check_defined("normalize", normalize, self.normalizes)
        if num_groups > 1 and not self.takes_groups:
            raise ValueError(
                f"MoE: gate.num_groups must be 1 for the estimator {type(self).__name__}, "
                f"{self.refusal}, got {num_groups}"
            )
        if num_experts % num_groups:
            raise ValueError(
                f"MoE: gate.num_groups must divide num_experts {num_experts}, got {num_groups}"
            )
        offered = top_groups * num_experts // num_groups
        if top_k > offered:
            raise ValueError(
                f"MoE: top_k must be in [1, {offered}], the experts of gate.top_groups "
                f"{top_groups}, got {top_k}"
            )
        self._layer = layer
        self.top_k = top_k
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.score_function = score_function
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.normalize = self.default_normalize() if normalize is None else normalize

    def default_normalize(self) -> str:
        """The normalisation if the gate sets none.

        "topk", except "none" for top_k = 1, whose "topk" weight is always 1, and for an estimator
        that is not defined for "topk".
        """
        return "topk" if self.top_k > 1 and "topk" in self.normalizes else "none"

    def select(
        self,
        logits: Tensor,
        *,
        selection_bias: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Chooses the experts.

        An estimator that samples overrides this and draws its noise from torch's default generator.

        Args:
            logits: [T, E].
            selection_bias: [E], see `rank`.
            token_mask: [T] bool; a token where it is False must get -1 in every slot.

        Returns:
            indices [T, K] int64, best first; -1 = not routed.
        """
        return ops.select_experts(
            self.rank(logits, selection_bias=selection_bias),
            self.top_k,
            token_mask=token_mask,
            tie_break=self.tie_break(logits, selection_bias=selection_bias),
        )

    def rank(self, logits: Tensor, *, selection_bias: Tensor | None = None) -> Tensor:
        """What the experts are ranked by, here and when a layer reroutes a slot.

        These are the logits. With a selection bias or groups of experts they are
        score_function(logits) plus the bias, and -inf for experts outside the token's groups.

        Args:
            logits: [T, E].
            selection_bias: [E] or None.

        Returns:
            scores [T, E], without a gradient.
        """
        tie_break = self.tie_break(logits, selection_bias=selection_bias)
        if tie_break is None:
            return logits.detach()
        scores = self.probs(tie_break)
        if selection_bias is not None:
            scores = scores + selection_bias.to(scores.dtype)
        if self.num_groups > 1:
            scores = limit_to_groups(scores, tie_break, self.num_groups, self.top_groups)
        return scores

    def tie_break(self, logits: Tensor, *, selection_bias: Tensor | None = None) -> Tensor | None:
        """What decides between experts whose `rank` is equal: the logits.

        Scores that have underflowed, or that a bias has absorbed, can be equal where the logits
        they were formed from differ.

        Args:
            logits: [T, E].
            selection_bias: [E] or None.

        Returns:
            [T, E], without a gradient; None if the logits themselves rank the experts.
        """
        if selection_bias is None and self.num_groups == 1:
            return None
        return logits.detach()

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
        return call_experts(experts, x, indices, weights)

    def update(self, statistics: Any) -> None:  # noqa: ANN401 (subclasses say which)
        """Changes the estimator's buffers, once per optimizer step.

        `MoE.update` calls it, without gradients.

        Args:
            statistics: what `combine` returned, summed over the micro-batches and the process
                group; None if it returned none.
        """

    def reset_parameters(self) -> None:
        """Resets parameters and buffers to initial values; for subclasses that have some."""

    def has_constant_weights(self, columns: int) -> bool:
        """Whether the weights from `weigh`, and their derivative, do not depend on the logits.

        If your own `weigh` gives weights that do depend on them, override this too.

        Args:
            columns: the number of columns of the ids that weights are formed for.
        """
        is_alone = columns == 1 and self.normalize == "topk"
        return self.gate_estimator == "exact" and (is_alone or self.normalize == "uniform")

    def probs(self, logits: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """score_function(logits) for every expert, with its exact derivative.

        Args:
            logits: [T, E].
            token_mask: [T] bool; 0 and no gradient where it is False.

        Returns:
            probs [T, E].
        """
        ids = torch.arange(self.num_experts, device=logits.device).expand(logits.shape)
        if token_mask is not None:
            ids = ids.masked_fill(~token_mask.unsqueeze(1), -1)
        return ops.gate_weights(
            logits,
            ids,
            score_function=self.score_function,
            normalize="none",
            estimator="exact",
        )

    def surrogate(self, logits: Tensor, selected: Tensor, indices: Tensor) -> Tensor | None:
        """The weights from which the router learns, where they are not the layer's own.

        An estimator that replaces the derivative on purpose declares the replacement here: the
        gradient of the logits is that of sum_i s_i G_i, with s the result and G_i = <dL/dy,
        E_i(x)>. It documents the estimator, and `torchmoe.testing.check_surrogate` differentiates
        it numerically; no layer calls it.

        Args:
            logits: [T, E].
            selected: [T, K], the ids as selected.
            indices: [T, K], the ids as routed.

        Returns:
            s [T, E]; or None if the gradient is the derivative of the layer's output.
        """
        del logits, selected, indices  # for subclasses
        return None

    def _check_defined(self, argument: str, value: str, choices: tuple[str, ...]) -> None:
        if value not in choices:
            listed = " or ".join(f'"{choice}"' for choice in choices)
            raise ValueError(
                f"MoE: gate.{argument} must be {listed} for the estimator {type(self).__name__}, "
                f'{self.refusal}, got "{value}"'
            )

    def extra_repr(self) -> str:
        """The gate's settings, once the estimator belongs to a layer, and its own."""
        gate: tuple[str, ...] = ()
        if self._layer is not None:
            gate = ("score_function", "normalize")
            gate += ("num_groups", "top_groups") if self.num_groups > 1 else ()
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in (*gate, *self.settings))
