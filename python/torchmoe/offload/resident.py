"""The experts in memory: who is in which slot, and what may be evicted."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from torchmoe.offload.loader import Loader
from torchmoe.offload.policies import Policy
from torchmoe.offload.slots import Slots
from torchmoe.offload.store import ExpertStore


class _Load(NamedTuple):
    """A read under way."""

    slot: int
    read: Future[None]


class Keys(NamedTuple):
    """Numbers of the experts, those in memory first: its slot, or S + its id if it has none."""

    of_expert: Tensor
    """[E + 1] int64 on the CPU: each expert's number, at the end -1 for what is not routed."""
    of_key: list[int]
    """[S + E]: each number's expert, or -1."""


class Counters:
    """What has been counted since `reset`: pairs of a call and an expert that it needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # the thread that reads counts too
        self.reset()

    def reset(self) -> None:
        """Sets all to 0."""
        with self._lock:
            self.hits = 0
            self.misses = 0
            self.predicted = 0  # of those needed in calls that a prediction was made for
            self.unpredicted = 0
            self.bytes_read = 0

    def call(self, hits: int, misses: int) -> None:
        """Takes a call."""
        with self._lock:
            self.hits += hits
            self.misses += misses

    def prediction(self, right: int, missed: int) -> None:
        """Takes a call that a prediction was made for."""
        with self._lock:
            self.predicted += right
            self.unpredicted += missed

    def read(self, num_bytes: int) -> None:
        """Takes a read."""
        with self._lock:
            self.bytes_read += num_bytes


class ResidentSet:
    """The slots of one module. Whoever uses them holds them by `held` or `try_held`.

    Args:
        store: where experts are read.
        memory: of the slots.
        num_slots: S, at most E.
        policy: says which resident is evicted.
        loader: reads.

    Attributes:
        memory: as given.
        num_slots: S.
        counters: what has been counted.
        resident_bytes: bytes of the memory that is held, and of the store's pages in the page cache
            while a read is under way.
        peak_resident_bytes: the most that resident_bytes has been.
    """

    def __init__(
        self,
        store: ExpertStore,
        memory: Slots,
        num_slots: int,
        policy: Policy,
        loader: Loader,
    ) -> None:
        self.store, self.policy, self.loader = store, policy, loader
        self.memory, self.num_slots = memory, num_slots
        self.counters = Counters()
        self._peak_bytes = 0
        self._locks: dict[int, threading.Lock] = {}
        self._clear()

    def _clear(self) -> None:
        self._process = os.getpid()
        self._slots: dict[int, int] = {}  # of residents
        self._loads: dict[int, _Load] = {}  # of experts under way, in the order of the reads
        self._free = list(reversed(range(self.num_slots)))
        self._used = 0  # slots from the first one on that hold memory
        self._keys: Keys | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Waits until no other thread uses the slots."""
        with self._lock():
            self._after_fork()
            yield

    @contextmanager
    def try_held(self) -> Iterator[bool]:
        """Gives False where another call uses the slots now."""
        lock = self._lock()
        if not lock.acquire(blocking=False):
            yield False
            return
        try:
            self._after_fork()
            yield True
        finally:
            lock.release()

    def _lock(self) -> threading.Lock:
        # A lock that another thread held when the process was forked is never released in the copy.
        return self._locks.setdefault(os.getpid(), threading.Lock())

    def _after_fork(self) -> None:
        # Reads that were under way go on in the other process alone.
        if self._process != os.getpid():
            self._clear()

    @property
    def resident_bytes(self) -> int:
        """See above."""
        window = self.store.window_bytes if self._loads else 0
        return self.memory.held_bytes(self._used) + window

    @property
    def peak_resident_bytes(self) -> int:
        """See above."""
        return max(self._peak_bytes, self.resident_bytes)

    @property
    def residents(self) -> Mapping[int, int]:
        """The slot of each expert that is in memory."""
        return self._slots

    @property
    def is_reading(self) -> bool:
        """Whether a read has not ended."""
        return any(not load.read.done() for load in self._loads.values())

    def keys(self) -> Keys:
        """What the rows of a call that begins now are sorted by."""
        if self._keys is None:
            num_experts = self.store.num_experts
            of_expert = [self.num_slots + expert for expert in range(num_experts)]
            of_key = [-1] * self.num_slots + list(range(num_experts))
            for expert, slot in self._slots.items():
                of_expert[expert], of_key[slot] = slot, expert
            self._keys = Keys(self.memory.integers([*of_expert, -1]), of_key)
        return self._keys

    @property
    def loading(self) -> Collection[int]:
        """The experts that are read, or will be."""
        return self._loads.keys()

    def settle(self, needed: Collection[int] = ()) -> None:
        """Takes in the reads that have ended. One that failed leaves its slot free.

        Raises:
            Exception: what the read of a needed one has raised.
        """
        for expert, load in list(self._loads.items()):
            if load.read.done():
                self._take(expert, load, expert in needed)

    def begin(self, slots: Mapping[int, int]) -> None:
        """Begins a call after `settle`.

        Args:
            slots: how many slots of the call each expert has that it needs.
        """
        self.policy.called(slots)
        self._cancel(slots)
        hits = sum(expert in self._slots for expert in slots)
        self.counters.call(hits, len(slots) - hits)

    def _cancel(self, needed: Collection[int]) -> None:
        """Gives up reads that were only predicted and have not begun."""
        for expert, load in list(self._loads.items()):
            if expert not in needed and load.read.cancel():
                self._take(expert, load, False)

    def prefetch(self, slots: Mapping[int, int]) -> None:
        """Asks for experts ahead of a call, those with the most slots first.

        Args:
            slots: how many slots of that call each expert will have.
        """
        self.settle()
        self._cancel(slots)
        for expert in in_order(slots):
            known = expert in self._slots or expert in self._loads
            if not known and not self.load(expert, keep=slots):
                return

    def fill(self, experts: Collection[int]) -> None:
        """Makes experts resident, at most S, and waits for them.

        Raises:
            Exception: what a read has raised.
        """
        self.settle()
        self._cancel(experts)
        for expert in experts:
            # What was predicted and is read now keeps its slot until then.
            while expert not in self._slots and expert not in self._loads:
                if not self.load(expert, keep=experts):
                    self.wait(experts)
        while any(expert in self._loads for expert in experts):
            self.wait(experts)

    def load(self, expert: int, keep: Collection[int]) -> bool:
        """Asks for an expert that is neither resident nor under way.

        Args:
            expert: its id.
            keep: experts that must not be evicted for it.

        Returns:
            Whether there was a slot for it.
        """
        if not self._free:
            victim = self.policy.victim(other for other in self._slots if other not in keep)
            if victim is None:
                return False
            self._free.append(self._slots.pop(victim))
            self._keys = None
        slot = self._free.pop()
        counters = self.counters
        try:
            reading = self.memory.reading(expert, slot)
            read = self.loader.submit(lambda: counters.read(reading()))
            self._loads[expert] = _Load(slot, read)
        except BaseException:
            self._free.append(slot)
            raise
        self._used = max(self._used, slot + 1)
        self._peak_bytes = self.peak_resident_bytes
        return True

    def wait(self, needed: Collection[int]) -> None:
        """Waits for the first of the experts that are under way, else for any other.

        Raises:
            Exception: what the read of a needed one has raised.
        """
        under_way = [expert for expert in self._loads if expert in needed] or list(self._loads)
        load = self._loads[under_way[0]]
        load.read.exception()
        self._take(under_way[0], load, under_way[0] in needed)

    def _take(self, expert: int, load: _Load, raises: bool) -> None:
        """Ends a read."""
        del self._loads[expert]
        error = None if load.read.cancelled() else load.read.exception()
        if load.read.cancelled() or error is not None:
            self._free.append(load.slot)
        else:
            self._slots[expert] = load.slot
            self._keys = None
        if raises and error is not None:
            raise error


def in_order(slots: Mapping[int, int]) -> list[int]:
    """The experts in the order in which they are read: most slots first, then the lower id."""
    return sorted(slots, key=lambda expert: (-slots[expert], expert))
