"""Slots seen by expert: how many there are, what they add up to, and which experts they name."""

from __future__ import annotations

import torch
from torch import Tensor


def count(indices: Tensor, num_experts: int) -> Tensor:
    """How often each expert is named along the last dimension: [..., N] -> [..., E] int64.

    An id outside [0, E) counts nowhere. Integers add up to the same in any order.
    """
    bins = _bins(indices, num_experts)
    counts = indices.new_zeros((*indices.shape[:-1], num_experts + 2))
    return counts.scatter_add(-1, bins, torch.ones_like(bins))[..., 1:-1]


def shares(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """The counts over their sum along the last dimension; 0 where nothing is counted."""
    if counts.is_floating_point():
        return counts.to(dtype)
    return counts.to(dtype) / counts.sum(dim=-1, keepdim=True).clamp(min=1)


def by_expert(values: Tensor, indices: Tensor, num_experts: int) -> Tensor:
    """For each token and expert the sum of the values of its slots there.

    Args:
        values: [T, K].
        indices: [T, K]; a slot with an id outside [0, E) is left out.
        num_experts: E.

    Returns:
        [T, E] in the dtype of values.
    """
    sums = values.new_zeros(indices.shape[0], num_experts + 2)
    return sums.scatter_add(1, _bins(indices, num_experts), values)[:, 1:-1]


def named(indices: Tensor, num_experts: int) -> Tensor:
    """Which experts the slots [T, K] of each token name: [T, E] bool."""
    return by_expert(torch.ones_like(indices), indices, num_experts) > 0


def _bins(indices: Tensor, num_experts: int) -> Tensor:
    """An expert's place between one for smaller ids and one for larger ones."""
    return indices.clamp(-1, num_experts) + 1
