"""Directions, and how well two of them match."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(vectors: Tensor) -> Tensor:
    """The vectors [..., G] at length 1; a zero vector stays one, with the identity's gradient."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / lengths.where(lengths > 0, 1)


def percent(cosine: Tensor) -> Tensor:
    """A match as users read it: 0 for opposite directions, 50 for unrelated, 100 for equal ones."""
    return 50 * (1 + cosine.clamp(-1, 1))
