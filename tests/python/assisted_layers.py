"""Layers with assistance."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from torchmoe.nn import Assistance, MoE

H, INNER, E, K, T = 6, 7, 5, 2, 23
F64 = torch.float64
RING = (1, 2, 3, 4, 0)
SLOTS = torch.tensor(K * T)


def make(assisted: Iterable[int] = (), **options: Any) -> MoE:
    """A layer in which these experts are assisted."""
    assistance = Assistance(RING, **options.pop("assistance", {}))
    assistance.assisted[list(assisted)] = True
    return MoE(H, INNER, E, K, assistance=assistance, **({"dtype": F64} | options))
