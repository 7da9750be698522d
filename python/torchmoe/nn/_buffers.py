"""Buffers that must not become 16-bit numbers with the parameters, and those that are settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain

import torch
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


def register_table(
    module: nn.Module, name: str, entries: Sequence[int], device: torch.device | str | None = None
) -> None:
    """Registers a setting as an int64 buffer, so that no forward pass copies it to the device.

    It is no part of the state: a state dict fits layers with other settings. What to_empty leaves
    in it is overwritten by `fill_table`, when a state dict is loaded at the latest.
    """
    table = torch.tensor(entries, dtype=torch.int64, device=device)
    module.register_buffer(name, table, persistent=False)
    fill = partial(_fill_after_loading, name, tuple(entries))
    module.register_load_state_dict_post_hook(fill)  # type: ignore[no-untyped-call]


@torch.no_grad()
def fill_table(module: nn.Module, name: str, entries: Sequence[int]) -> None:
    """Writes the setting into its buffer again."""
    table = getattr(module, name)
    if table.is_meta:
        # Parameters that were loaded by assignment have left the meta device without it.
        others = chain(module.parameters(), module.buffers())
        device = next((tensor.device for tensor in others if not tensor.is_meta), table.device)
        setattr(module, name, torch.tensor(entries, dtype=torch.int64, device=device))
    else:
        table.copy_(torch.tensor(entries, dtype=torch.int64))


def _fill_after_loading(
    name: str, entries: Sequence[int], module: nn.Module, incompatible_keys: object
) -> None:
    del incompatible_keys
    fill_table(module, name, entries)
