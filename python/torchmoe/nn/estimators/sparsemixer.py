"""Experts drawn one after another, with an unbiased estimate of their gradient's expectation."""

from __future__ import annotations

import torch
from torch import Tensor

from torchmoe import ops
from torchmoe._by_expert import by_expert, named
from torchmoe._checks import Checked, check_not_negative
from torchmoe.nn.estimators.estimator import Estimator
from torchmoe.nn.estimators.gumbel_straight_through import gumbel_like

_FULL_WEIGHT_CHANCE = 1 / 4
_REDUCED_WEIGHT = 1 / 3


class SparseMixer(Estimator):
    """SparseMixer-v2 (Liu et al., arXiv 2409.12136), the router of GRIN MoE and Phi-3.5-MoE.

    The top_k slots are filled one after another. For slot j, with z the logits:

        mask      the experts of the slots before, and those whose logit lies far below the largest
                  of the rest: (max - z_i) / max(|z_i|, max) > 2 * jitter
        q         softmax of the logits that are left
        expert    training: a draw from q;  evaluation: the largest
        m         q of the expert
        forward   w_j = m * c.  In training c = 1 if the expert is the largest or a coin of
                  probability 1/4 says so, else 1/3;  in evaluation c = 1
        backward  dL/dz = dL/dw_j * m * (onehot(expert) - q), with m instead of w_j

    The factors 1/4 and 1/3 come from Heun's third-order method, which estimates the gradient of the
    expectation over the draw. The masks follow from the ids as selected, so a slot that capacity
    drops does not change the other weights. Draws come from torch's default generator, so that
    activation checkpointing replays them.

    It costs a few element-wise passes over [T, E] per slot. If the logits differ by about their own
    size, a jitter of 0.01 leaves a single expert for most tokens; then m = 1 and its gradient is 0.

    Args:
        jitter: half the relative distance from the largest logit within which experts compete.

    Raises:
        ValueError: jitter is negative or not finite.
    """

    score_functions = ("softmax",)
    normalizes = ("none",)
    takes_groups = False
    takes_selection_bias = False
    refusal = "whose gradient is that of a draw from the softmax"
    settings = ("jitter",)
    draws = True

    jitter = Checked(check_not_negative)

    def __init__(self, jitter: float = 0.01) -> None:
        super().__init__()
        self.jitter = jitter

    def select(
        self,
        logits: Tensor,
        *,
        selection_bias: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """The experts of the slots, one after another.

        Raises:
            ValueError: there is a selection bias.
        """
        if selection_bias is not None:
            raise ValueError(
                "SparseMixer: selection_bias must be None, because the gradient is that of a draw "
                f"from the unbiased softmax, got one of shape {list(selection_bias.shape)}"
            )
        logits = logits.detach()
        taken = torch.zeros_like(logits, dtype=torch.bool)
        slots: list[Tensor] = []
        for _ in range(self.top_k):
            scores = self._compete(logits, taken)
            if self.training:
                scores = scores + gumbel_like(scores)
            slots.append(_best(scores, taken, token_mask))
            taken = taken | named(slots[-1], self.num_experts)
        return torch.cat(slots, dim=1)

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        """The weights m * c, with the gradient of m."""
        m, largest = self._multipliers(logits, indices)
        if not self.training:
            return m
        full = largest | (torch.rand_like(m) < _FULL_WEIGHT_CHANCE)
        # Added and not multiplied, so that the factor stays out of the gradient.
        return m + (m * (_REDUCED_WEIGHT - 1)).masked_fill(full, 0).detach()

    def surrogate(self, logits: Tensor, selected: Tensor, indices: Tensor) -> Tensor:
        """The m of the experts that serve the token, without the factor c: [T, E]."""
        m, _ = self._multipliers(logits, selected)
        return by_expert(m, indices, self.num_experts)

    def _multipliers(self, logits: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """For each slot m, and whether its expert is the largest of those that competed: [T, K]."""
        taken = torch.zeros_like(logits, dtype=torch.bool)
        m, largest = [], []
        for slot in torch.split(indices, 1, dim=1):
            competing = self._compete(logits, taken)
            m.append(
                ops.gate_weights(
                    competing,
                    slot,
                    score_function=self.score_function,
                    normalize=self.normalize,
                    estimator=self.gate_estimator,
                )
            )
            largest.append(slot == _best(competing.detach(), taken, None))
            taken = taken | named(slot, self.num_experts)
        return torch.cat(m, dim=1), torch.cat(largest, dim=1)

    def _compete(self, logits: Tensor, taken: Tensor) -> Tensor:
        """The logits of the experts that may get the slot, -inf for the others: [T, E]."""
        z = logits.detach()
        most = z.masked_fill(taken, -torch.inf).amax(dim=1, keepdim=True)
        far = (most - z) / torch.maximum(z.abs(), most) > 2 * self.jitter
        return logits.masked_fill(taken | far, -torch.inf)


def _best(scores: Tensor, taken: Tensor, token_mask: Tensor | None) -> Tensor:
    """The id [T, 1] of the largest score, never a taken id while another is left."""
    # select_experts ranks NaN last, after -inf, so that a taken expert comes after the others even
    # where all of them are masked.
    ranked = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return ops.select_experts(ranked.masked_fill(taken, torch.nan), 1, token_mask=token_mask)
