"""Settings that are lists of integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Table:
    """Integers that are a setting, with a copy of them on the device where they are read.

    A setting is not a buffer: frameworks fill, average and cast buffers, and skip those that are
    not in a state dict. A module keeps its table as a plain attribute, which `Remembering` moves in
    `_apply`, so that no forward pass copies it to the device. If the parameters reach a device in
    another way, the first pass there copies the table, or under a compiler every pass.

    Args:
        entries: the integers.
        device: where they will be read.

    Attributes:
        entries: the integers.
    """

    def __init__(self, entries: Sequence[int], device: torch.device | str | None = None) -> None:
        self.entries = tuple(entries)
        self._copy: Tensor | None = None
        self._made(torch.device("cpu" if device is None else device))

    def on(self, device: torch.device) -> Tensor:
        """The integers as int64 on a device, [len(entries)]."""
        copy = self._copy
        if copy is not None:
            if torch.compiler.is_compiling():
                return copy.to(device)
            # Under a mode such as fake tensors a real one has no place among its operands.
            if copy.device == device and torch._C._len_torch_dispatch_stack() == 0:
                return copy
        return self._made(device)

    def follow(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves to the device that fn, the argument of `Module._apply`, moves a tensor to."""
        here = "cpu" if self._copy is None else self._copy.device
        self._made(fn(torch.empty(0, dtype=torch.int64, device=here)).device)

    def _made(self, device: torch.device) -> Tensor:
        """The integers on a device; the copy is kept unless its values could not be read later."""
        # One made in inference mode would be of no use to a later pass with a gradient.
        with torch.inference_mode(False):
            made = torch.tensor(self.entries, dtype=torch.int64, device=device)
        if type(made) is Tensor and not made.is_meta and not torch.compiler.is_compiling():
            self._copy = made
        return made
