"""Buffers that must not become 16-bit numbers, with the parameters or in a loader's hands.

A 16-bit running average stops moving: its steps are smaller than half a unit in the last place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchmoe.nn._rows import wide


@contextmanager
def keep_wide(module: nn.Module, name: str) -> Iterator[None]:
    """Gives the buffer its values back where a conversion inside the block made them 16-bit.

    The buffer still follows the module to another device.
    """
    before = getattr(module, name)
    yield
    after = getattr(module, name)
    if before is not None and after.itemsize < 4:
        setattr(module, name, before.to(after.device))


def widen_entry(state_dict: dict[str, Any], key: str) -> None:
    """Widens what is about to be loaded, which assign=True would put in the buffer's place."""
    entry = state_dict.get(key)
    if isinstance(entry, Tensor) and entry.is_floating_point():
        state_dict[key] = wide(entry)


def move(module: nn.Module, name: str, values: Tensor) -> None:
    """Writes values, float32 or wider, into the buffer.

    A loader may have put a 16-bit tensor in its place, which then is replaced by the values.
    """
    buffer = getattr(module, name)
    if buffer.dtype == torch.promote_types(buffer.dtype, torch.float32):
        buffer.copy_(values)
    else:
        setattr(module, name, values.to(buffer.device))
