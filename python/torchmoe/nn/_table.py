"""Settings that are lists of integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Table:
    """Integers that are a setting, with a copy of them on the device where they are read.

    A setting is no buffer: frameworks fill, average and cast buffers, and leave out those that are
    not in a state dict. A module keeps its table as a plain attribute and takes it along in
    `_apply`, so that no forward pass copies it to the device.

    Args:
        entries: the integers.
        device: where they will be read.

    Attributes:
        entries: the integers.
    """

    def __init__(self, entries: Sequence[int], device: torch.device | str | None = None) -> None:
        self.entries = tuple(entries)
        self._copy = self._on("cpu")
        if device is not None:
            self.move(torch.device(device))

    def on(self, device: torch.device) -> Tensor:
        """The integers as int64 on a device, [len(entries)]."""
        if torch.compiler.is_compiling():
            return self._copy.to(device)
        # Under a mode such as fake tensors a real one has no place among its operands.
        if self._copy.device == device and torch._C._len_torch_dispatch_stack() == 0:
            return self._copy
        return self._on(device)

    def follow(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Goes to the device that fn, what `Module._apply` is given, takes a tensor to."""
        self.move(fn(torch.empty(0, device=self._copy.device)).device)

    def move(self, device: torch.device) -> None:
        """Goes to a device, but for the meta device, where nothing could be read back."""
        if device.type != "meta" and device != self._copy.device:
            self._copy = self._on(device)

    def _on(self, device: torch.device | str) -> Tensor:
        return torch.tensor(self.entries, dtype=torch.int64, device=device)
