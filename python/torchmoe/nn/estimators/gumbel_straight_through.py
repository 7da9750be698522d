"""Straight-through over experts that are drawn at random."""

from __future__ import annotations

import torch
from torch import Tensor

from torchmoe._checks import Checked, check_not_negative
from torchmoe.nn.estimators.straight_through import StraightThrough


class GumbelStraightThrough(StraightThrough):
    """Experts drawn without replacement, with the gradient of `StraightThrough`.

        training    the top-k of z + temperature * g, with Gumbel noise g for each expert
        evaluation  the top-k of z

    At temperature 1 the experts are a draw of top_k without replacement from softmax(z) (the
    Gumbel-top-k trick: Kool et al., arXiv 1903.06059). Weights and losses are formed from z
    without the noise. A token's experts therefore change from step to step, and every expert has a
    chance, which grows with the temperature.

    The noise comes from torch's default generator, so that activation checkpointing replays it.

    Args:
        temperature: scale of the noise; at 0 nothing is drawn.

    Raises:
        ValueError: temperature is negative or not finite.
    """

    settings = ("temperature",)
    draws = True

    temperature = Checked(check_not_negative)

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def select(
        self,
        logits: Tensor,
        *,
        selection_bias: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """The experts: in training a draw, in evaluation the top-k."""
        scores = logits.detach()
        if self.training and self.temperature > 0:
            scores = scores + self.temperature * gumbel_like(scores)
        return super().select(scores, selection_bias=selection_bias, token_mask=token_mask)


def gumbel_like(scores: Tensor) -> Tensor:
    """Standard Gumbel noise, -log(-log u): the largest of z + noise is a draw from softmax(z).

    From torch's default generator, so that activation checkpointing replays it.
    """
    return -torch.empty_like(scores).exponential_().log()
