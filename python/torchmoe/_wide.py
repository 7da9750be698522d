"""Tensors in float32 or wider: what is added up, ranked or remembered in small steps."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(*dtypes: torch.dtype | None) -> torch.dtype:
    """float32, or the widest of these where that is wider; None is torch's default."""
    wide = torch.float32
    for dtype in dtypes:
        wide = torch.promote_types(wide, dtype or torch.get_default_dtype())
    return wide


def wide(values: Tensor) -> Tensor:
    """The values in float32, or in their own type where that is wider."""
    return values.to(wide_dtype(values.dtype))
