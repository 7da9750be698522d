"""Streams of a device that runs what it was asked for later, in any order that its events allow.

`LateDevice` stands in for `torch.cuda` on the CPU. Work on a stream waits in a queue. How far each
queue gets, and when, is up to `eager` and a random number; only events order one queue against
another. So a wait that is missing shows as a wrong number.

The caller's ops run twice: at once, since their results must have shapes, and again when their turn
in the queue comes, into the same memory. Only the numbers of the second time count, and a caller
who looks at one waits for them. New memory is filled with NaN at its turn, as if what had been
there before were still in use until then.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map


class LateEvent:
    """A place in a stream's queue."""

    def __init__(self, stream: LateStream) -> None:
        self.stream, self.is_reached = stream, False

    def synchronize(self) -> None:
        """Lets the device run until it is reached."""
        self.stream.device.run_until(self)


class LateStream:
    """A queue of work."""

    def __init__(self, device: LateDevice) -> None:
        self.device = device
        self.queue: deque[Callable[[], None] | LateEvent] = deque()
        device.streams.append(self)

    def ask(self, work: Callable[[], None]) -> None:
        """Appends work."""
        with self.device.lock:
            self.queue.append(work)
            self.device.run_some()

    def record_event(self) -> LateEvent:
        """Appends an event."""
        event = LateEvent(self)
        self.ask(lambda: setattr(event, "is_reached", True))
        return event

    def wait_event(self, event: LateEvent) -> None:
        """Lets what is appended from now on wait for it."""
        with self.device.lock:
            self.queue.append(event)

    def step(self) -> bool:
        """Runs the next piece of work; False if there is none, or an event keeps it."""
        while self.queue:
            first = self.queue[0]
            if not isinstance(first, LateEvent):
                self.queue.popleft()
                with _disable_current_modes(), torch._C._AutoDispatchBelowAutograd():
                    first()
                return True
            if not first.is_reached:
                return False
            self.queue.popleft()
        return False


class LateDevice:
    """What `CudaSlots` uses of `torch.cuda` and of tensors.

    Args:
        eager: which streams run as soon as they can: "copies", "computing", or "any", a random one
            for a random while.
        seed: of that.

    Attributes:
        lock: of the queues.
        streams: all of them, those for computing first.
        kept: the streams that `Tensor.record_stream` was told of, by the memory's address.
        pinned: the addresses of pinned memory.
        waits: how often a caller has waited to look at a number.
    """

    def __init__(self, eager: str, seed: int = 0) -> None:
        self.lock = threading.RLock()
        self.streams: list[LateStream] = []
        self.kept: dict[int, set[LateStream]] = {}
        self.pinned: set[int] = set()
        self.waits = 0
        self._host: dict[int, Tensor] = {}  # the CPU's memory, which no stream has to do with
        self._eager, self._draw = eager, random.Random(seed)
        self._own = threading.local()
        self.computing = [LateStream(self) for _ in range(2)]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Puts it in the place of torch's own."""
        tolist = Tensor.tolist

        def of_host(make: Callable[..., Tensor], *, always: bool) -> Callable[..., Tensor]:
            def made(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
                if not always and not pin_memory:
                    return make(*args, **options)
                with _disable_current_modes():
                    result = make(*args, **options)
                self._host[result.data_ptr()] = result
                if pin_memory:
                    self.pinned.add(result.data_ptr())
                return result

            return made

        def looked_at(given: Tensor) -> Any:
            if given.data_ptr() not in self._host:
                self.wait()
            return tolist(given)

        def keep(given: Tensor, stream: LateStream) -> None:
            self.kept.setdefault(given.data_ptr(), set()).add(stream)

        monkeypatch.setattr(torch, "empty", of_host(torch.empty, always=False))
        monkeypatch.setattr(torch, "tensor", of_host(torch.tensor, always=True))
        monkeypatch.setattr(Tensor, "tolist", looked_at)
        monkeypatch.setattr(Tensor, "record_stream", keep, raising=False)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: LateStream(self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)

    @property
    def current(self) -> LateStream:
        """This thread's current stream."""
        return getattr(self._own, "stream", self.computing[0])

    @contextmanager
    def on(self, stream: LateStream) -> Iterator[None]:
        """This thread's ops are asked of a stream; of one that copies, only copies are."""
        before, self._own.stream = self.current, stream
        try:
            with _Asked(stream, twice=stream in self.computing):
                yield
        finally:
            self._own.stream = before

    def wait(self) -> None:
        """Waits for what this thread has asked its stream for."""
        self.waits += 1
        self.current.record_event().synchronize()

    def run_some(self) -> None:
        """Runs what runs at once."""
        if self._eager == "any":
            for _ in range(self._draw.choice((0, 0, 1, 5))):
                self._draw.choice(self.streams).step()
            return
        for stream in self.streams:
            if (stream in self.computing) == (self._eager == "computing"):
                while stream.step():
                    pass

    def run_until(self, event: LateEvent) -> None:
        """Runs nothing that the event does not need, unless it is eager."""
        with self.lock:
            while not event.is_reached:
                stream = event.stream
                while not stream.step():
                    first = stream.queue[0]
                    assert isinstance(first, LateEvent)
                    stream = first.stream
                self.run_some()

    def run_all(self) -> None:
        """Runs everything."""
        with self.lock:
            while any(stream.step() for stream in self.streams):
                pass
            assert not any(stream.queue for stream in self.streams)


class _Asked(TorchDispatchMode):
    """Asks a stream for each op."""

    def __init__(self, stream: LateStream, *, twice: bool) -> None:
        super().__init__()
        self._stream, self._twice = stream, twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default and not self._twice:
            into, source = args[:2]
            self._stream.ask(lambda: func(into, source))
            return into
        if func is torch.ops.aten._local_scalar_dense.default:
            self._stream.device.wait()
        result = func(*args, **kwargs)
        if self._twice and (again := _again(func, args, kwargs, result)) is not None:
            self._stream.ask(again)
        return result


def _again(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> Callable[[], None] | None:
    """Writes the result of an op once more; None if it is part of what was given."""
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    if func._schema.is_mutable:
        args, kwargs = tree_map(_uncounted, (args, kwargs))
        return lambda: func(*args, **kwargs)
    held = {t.untyped_storage().data_ptr() for t in given if t.numel() > 0}
    if any(t.untyped_storage().data_ptr() in held for t in made):
        return None
    if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty):
        return lambda: _fill(made, torch.nan)

    def write() -> None:
        again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
        for into, value in zip(made, again, strict=True):
            _uncounted(into).copy_(value)

    return write


def _fill(tensors: list[Tensor], value: float) -> None:
    for tensor in tensors:
        if tensor.is_floating_point():
            _uncounted(tensor).fill_(value)


def _uncounted(given: Any) -> Any:
    """A tensor of the same memory, in which autograd does not count what is written."""
    return given.data if isinstance(given, Tensor) else given
