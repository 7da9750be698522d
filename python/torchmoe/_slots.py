"""From slots to experts."""

from __future__ import annotations

import torch
from torch import Tensor


def by_expert(values: Tensor, indices: Tensor, num_experts: int) -> Tensor:
    """For each token and expert the sum of the values of its slots there.

    Args:
        values: [T, K].
        indices: [T, K]; a slot with an id outside [0, E) is left out.
        num_experts: E.

    Returns:
        [T, E] in the dtype of values.
    """
    routed = (indices >= 0) & (indices < num_experts)
    beyond = indices.where(routed, num_experts)
    sums = values.new_zeros(indices.shape[0], num_experts + 1)
    return sums.scatter_add(1, beyond, values)[:, :num_experts]


def named(indices: Tensor, num_experts: int) -> Tensor:
    """Which experts the slots [T, K] of each token name: [T, E] bool."""
    return by_expert(torch.ones_like(indices), indices, num_experts) > 0
