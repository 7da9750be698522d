"""Buffers that must not become 16-bit numbers with the parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def keep_wide(module: nn.Module, name: str) -> Iterator[None]:
    """Gives the buffer its values back where a conversion inside the block made them 16-bit.

    A 16-bit running average stops moving: its steps are smaller than half a unit in the last place.
    The buffer still follows the module to another device.
    """
    before = getattr(module, name)
    yield
    after = getattr(module, name)
    if before is not None and after.itemsize < 4:
        setattr(module, name, before.to(after.device))
