"""Random draws, from torch's default generator, so that activation checkpointing replays them."""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel_like(scores: Tensor) -> Tensor:
    """Standard Gumbel noise, -log(-log u): the largest of z + noise is a draw from softmax(z)."""
    return -torch.empty_like(scores).exponential_().log()
