"""The way from routings to records, many at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

import torch

from torchmoe.monitor._history import History, Record
from torchmoe.monitor.statistics import Measurement, complete, measure, pack
from torchmoe.nn.routing import Routing

# Logits that wait for others, 1 MB in float32: with more, a call of torch is worth its while.
_MOST_LOGITS = 2**18
# Measured passes that wait for others; together they take a small part of the time.
_MOST_MEASURED = 256


class Intake:
    """Measures the layers of a model together, and completes the measurements of many steps.

    Each saves calls of torch, of which the work otherwise consists. What has the size of the tokens
    waits, without its graph, until every layer has run, and never for more than _MOST_LOGITS.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._routings: dict[History, tuple[int, Routing]] = {}
        self._num_logits = 0
        self._measured: list[tuple[list[tuple[History, int]], Measurement]] = []
        self._num_measured = 0

    def add(self, history: History, forward: int, routing: Routing) -> None:
        """Takes the routing of a layer's pass and its number."""
        if history in self._routings:  # some layer had no pass
            self.measure()
        detached = routing._replace(
            logits=routing.logits.detach(),
            weights=routing.weights.detach(),
            losses={},
            statistics=None,
            details={},
        )
        self._routings[history] = forward, detached
        self._num_logits += routing.logits.numel()
        if len(self._routings) == self._num_layers or self._num_logits > _MOST_LOGITS:
            self.measure()

    def measure(self) -> None:
        """Reads what waits, and lets go of it."""
        alike: dict[Hashable, list[History]] = defaultdict(list)
        for history, (_, routing) in self._routings.items():
            alike[_kind(routing)].append(history)
        for histories in alike.values():
            passes = [(history, self._routings[history][0]) for history in histories]
            measured = measure([self._routings[history][1] for history in histories])
            self._measured.append((passes, measured))
        self._num_measured += len(self._routings)
        self._routings, self._num_logits = {}, 0
        if self._num_measured >= _MOST_MEASURED:
            self.complete()

    def complete(self) -> None:
        """Brings everything into the histories."""
        if self._routings:
            self.measure()
        alike: dict[Hashable, list[tuple[list[tuple[History, int]], Measurement]]]
        alike = defaultdict(list)
        for passes, measured in self._measured:
            counts = measured.tokens_per_expert
            alike[counts.shape[1], counts.device].append((passes, measured))
        self._measured, self._num_measured = [], 0
        for parts in alike.values():
            fields = zip(*(measured for _, measured in parts), strict=True)
            together = Measurement(*(torch.cat(field) for field in fields))
            sums = iter(pack(complete(together)).unbind())
            records: dict[History, list[Record]] = defaultdict(list)
            for passes, _ in parts:
                for history, forward in passes:
                    records[history].append(Record(forward, 1, next(sums)))
            for history, new in records.items():
                history.extend(new)


def _kind(routing: Routing) -> Hashable:
    """Routings of one kind can be measured together."""
    shapes = routing.logits.shape, routing.selected.shape
    dtypes = routing.logits.dtype, routing.weights.dtype
    return shapes, dtypes, routing.logits.device, routing.token_mask is None
