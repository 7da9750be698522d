"""The record of one layer's passes, in bounded memory and without waiting for a device."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchmoe.monitor.statistics import RoutingStatistics, unpack


class Record(NamedTuple):
    """Neighbouring forward passes."""

    forward: int
    """Number of the first one, from 0."""
    forwards: int
    """How many were taken."""
    sums: Tensor
    """[2 E + 9] float64: the sum over them of `statistics.pack`."""

    def statistics(self) -> RoutingStatistics:
        """Counts are sums over the passes, all other values means."""
        return unpack(self.sums, self.forwards)


class History:
    """Records of one layer, and for each reader what it has not read yet.

    Once there are more than max_records, neighbours are merged in pairs and from then on each new
    record takes twice as many passes: the whole history has one resolution, and counts stay exact.
    Records are values; adding to one makes a new one.
    """

    def __init__(self, max_records: int, readers: tuple[str, ...]) -> None:
        self.records: list[Record] = []
        self._max_records = max_records
        self._forwards_per_record = 1
        self._unread: dict[str, Record | None] = dict.fromkeys(readers)

    def extend(self, new: list[Record]) -> None:
        """Keeps passes, a record for each."""
        for record in new:
            self._append(record)
        total = merged(new, len(new))[0]
        for reader, unread in self._unread.items():
            self._unread[reader] = total if unread is None else merged([unread, total], 2)[0]

    def read(self, reader: str) -> Record | None:
        """The passes since this reader's last call, None if there were none."""
        record, self._unread[reader] = self._unread[reader], None
        return record

    def total(self) -> Record | None:
        """All passes as one record, None if there were none."""
        return merged(self.records, len(self.records))[0] if self.records else None

    def to_records(self) -> list[dict[str, Any]]:
        """Each record as plain numbers and lists."""
        if not self.records:
            return []
        # One transfer from the device.
        sums = torch.stack([record.sums for record in self.records]).cpu()  # [N, 2 E + 9]
        forwards = [record.forwards for record in self.records]
        statistics = unpack(sums, sums.new_tensor(forwards).unsqueeze(1))
        names = ("forward", "forwards", *RoutingStatistics._fields)
        firsts = [record.forward for record in self.records]
        columns = (firsts, forwards, *(field.tolist() for field in statistics))
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def _append(self, record: Record) -> None:
        records = self.records
        if records and records[-1].forwards < self._forwards_per_record:
            records[-1:] = merged([records[-1], record], 2)
            return
        records.append(record)
        if len(records) > self._max_records:
            self.records = merged(records, 2)
            self._forwards_per_record *= 2


def merged(records: list[Record], size: int) -> list[Record]:
    """Each `size` neighbouring records as one, the rest at the end as one of fewer."""
    bounds = [*range(0, len(records), size), len(records)]
    whole = len(records) // size
    # All at once: a device gets a few calls, not some for each record.
    stacked = torch.stack([record.sums for record in records])  # [N, 2 E + 9]
    width = stacked.shape[1]
    sums = [*stacked[: whole * size].reshape(whole, size, width).sum(1).unbind()]
    if whole * size < len(records):
        sums.append(stacked[whole * size :].sum(0))
    return [
        Record(records[first].forward, sum(r.forwards for r in records[first:end]), group)
        for (first, end), group in zip(pairwise(bounds), sums, strict=True)
    ]
