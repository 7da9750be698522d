"""Layers with a capacity."""

from __future__ import annotations

from typing import Any

from limited import F64
from torchmoe.nn import Capacity, MoE

H, INNER, E, K, T = 6, 7, 5, 2, 23
RING = (1, 2, 3, 4, 0)


def make(capacity: Capacity | None, top_k: int = K, **options: Any) -> MoE:
    return MoE(H, INNER, E, top_k, capacity=capacity, **({"dtype": F64} | options))
