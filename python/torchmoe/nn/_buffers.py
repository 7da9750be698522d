"""Buffers that must not be rounded to 16 bits, neither with the parameters nor by a loader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchmoe._wide import wide
from torchmoe.nn._part import Part
from torchmoe.nn._table import Table

Self = TypeVar("Self", bound="Remembering")


class Remembering(Part):
    """Base of modules with buffers that stay float32 or wider, and with tables.

    A 16-bit running average stops moving: its steps are smaller than half a unit in the last place.
    Conversions of the module and state dicts leave such buffers wide. Where a loader has put
    another tensor in the place of one, `widened` mends it before it moves, and until then readers
    take it as it is.

    Attributes:
        wide_buffers: the names of those; one may be None.
    """

    wide_buffers: tuple[str, ...] = ()

    @torch.no_grad()
    def widened(self, name: str) -> Tensor:
        """The buffer, float32 or wider, for `update` to read and to write."""
        buffer: Tensor = getattr(self, name)
        if _is_narrow(buffer):
            # In place: others, such as DistributedDataParallel, hold the same tensor.
            buffer.data = wide(buffer)
        return buffer

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: getattr(self, name) for name in self.wide_buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            if buffer is not None and _is_narrow(after := getattr(self, name)):
                setattr(self, name, wide(after if buffer.is_meta else buffer).to(after.device))
        for table in vars(self).values():
            if isinstance(table, Table):
                table.follow(fn)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        *rest: Any,  # noqa: ANN401 (torch's own)
    ) -> None:
        for name in self.wide_buffers:
            if getattr(self, name) is None:
                continue
            self.widened(name)
            # With assign=True the entry itself takes the buffer's place.
            if isinstance(entry := state_dict.get(prefix + name), Tensor) and _is_narrow(entry):
                state_dict[prefix + name] = wide(entry)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _is_narrow(buffer: Tensor) -> bool:
    return not buffer.is_floating_point() or buffer.itemsize < 4
