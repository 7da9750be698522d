"""The memory of the experts that are resident, one class for each kind of device.

A slot has room for one expert. All slots lie in one buffer for each matrix, [S, ...], so that one
op computes any of them at once. A thread reads experts into slots while others are computed.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from torchmoe.offload.store import ExpertStore


class Slots(ABC):
    """Base of the kinds of memory.

    Args:
        store: where experts are read.
        matrices: for each tensor of an expert its shape [E, ...] and dtype, as a meta tensor.
        num_slots: S.
        device: where the experts compute.

    Attributes:
        num_staged: of how many experts there are copies beside the slots.
    """

    num_staged = 0

    def __init__(
        self,
        store: ExpertStore,
        matrices: Mapping[str, Tensor],
        num_slots: int,
        device: torch.device,
    ) -> None:
        self._store, self._like = store, matrices
        self._num_slots, self._device = num_slots, device

    @property
    @abstractmethod
    def matrices(self) -> Mapping[str, Tensor]:
        """For each tensor of an expert the slots [S, ...]."""

    @abstractmethod
    def held_bytes(self, num_slots: int) -> int:
        """Bytes of copies of experts, if there is or was one in so many slots."""

    @abstractmethod
    def reading(self, expert: int, slot: int) -> Callable[[], int]:
        """What reads an expert into a slot, in a thread of its own, and returns the bytes read."""

    @abstractmethod
    def used(self, slots: Collection[int]) -> AbstractContextManager[None]:
        """For the time in which ops are called that use these slots, after they have been read."""

    @abstractmethod
    def integers(self, values: list[int]) -> Tensor:
        """Integers in the CPU's memory, which `moved` takes to the device."""

    @abstractmethod
    def moved(self, integers: Tensor) -> Tensor:
        """The same on the device; the CPU does not wait for it."""

    def _empty(self, device: torch.device) -> dict[str, Tensor]:
        with torch.inference_mode(False):
            return {
                name: torch.empty(self._num_slots, *like.shape[1:], dtype=like.dtype, device=device)
                for name, like in self._like.items()
            }


class _CpuSlots(Slots):
    """Slots in the CPU's memory, into which experts are read directly.

    The system gives memory to a slot when it is first written.
    """

    def __init__(
        self,
        store: ExpertStore,
        matrices: Mapping[str, Tensor],
        num_slots: int,
        device: torch.device,
    ) -> None:
        super().__init__(store, matrices, num_slots, device)
        self._matrices = self._empty(device)

    @property
    def matrices(self) -> Mapping[str, Tensor]:
        return self._matrices

    def held_bytes(self, num_slots: int) -> int:
        return num_slots * self._store.expert_bytes

    def reading(self, expert: int, slot: int) -> Callable[[], int]:
        into = {name: matrix[slot] for name, matrix in self._matrices.items()}
        return lambda: self._store.read(expert, into)

    def used(self, slots: Collection[int]) -> AbstractContextManager[None]:
        del slots
        return nullcontext()

    def integers(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device="cpu")

    def moved(self, integers: Tensor) -> Tensor:
        return integers


class _CudaSlots(Slots):
    """Slots on a CUDA device.

    An expert is read into pinned memory of the CPU, and from there a stream of its own copies it
    into its slot. A read has ended when the copy has been asked for; the device keeps the order:

    - the copy into a slot waits for what was computed with the slot before, on any stream;
    - what is computed with the slot waits for the copy;
    - the next read into the pinned memory waits for the copy from there.

    All of it is allocated at the first use, when the experts that were given have been freed.
    """

    num_staged = 1

    def __init__(
        self,
        store: ExpertStore,
        matrices: Mapping[str, Tensor],
        num_slots: int,
        device: torch.device,
    ) -> None:
        super().__init__(store, matrices, num_slots, device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._matrices: dict[str, Tensor] | None = None
        # The end of each slot's last use, by the stream that used it.
        self._uses: list[dict[torch.cuda.Stream, torch.cuda.Event]] = []
        self._copied: dict[int, torch.cuda.Event] = {}  # the end of each slot's last copy
        # Of the pinned memory: after `link` another thread reads.
        self._lock = threading.Lock()
        self._pinned: dict[str, Tensor] = {}
        self._emptied: torch.cuda.Event | None = None  # the end of the last copy from there

    @property
    def matrices(self) -> Mapping[str, Tensor]:
        if self._matrices is None:
            with torch.inference_mode(False):
                self._pinned = {
                    name: torch.empty(
                        like.shape[1:], dtype=like.dtype, device="cpu", pin_memory=True
                    )
                    for name, like in self._like.items()
                }
            matrices = self._empty(self._device)
            for matrix in matrices.values():
                matrix.record_stream(self._stream)
            current = torch.cuda.current_stream(self._device)
            # Work on this stream may still use the memory, for tensors that have been freed since.
            allocated = current.record_event()
            self._uses = [{current: allocated} for _ in range(self._num_slots)]
            self._matrices = matrices
        return self._matrices

    def held_bytes(self, num_slots: int) -> int:
        del num_slots  # memory is that of all slots
        if self._matrices is None:
            return 0
        return (self._num_slots + self.num_staged) * self._store.expert_bytes

    def reading(self, expert: int, slot: int) -> Callable[[], int]:
        matrices = self.matrices

        def read() -> int:
            with self._lock:
                if self._emptied is not None:
                    self._emptied.synchronize()
                num_bytes = self._store.read(expert, self._pinned)
                self._copy({name: matrix[slot] for name, matrix in matrices.items()}, slot)
            return num_bytes

        return read

    def _copy(self, into: Mapping[str, Tensor], slot: int) -> None:
        """Asks for the copy of what has been read."""
        for used in self._uses[slot].values():
            self._stream.wait_event(used)
        try:
            with torch.cuda.stream(self._stream):
                for name, tensor in into.items():
                    tensor.copy_(self._pinned[name], non_blocking=True)
        finally:
            self._emptied = self._copied[slot] = self._stream.record_event()

    @contextmanager
    def used(self, slots: Collection[int]) -> Iterator[None]:
        stream = torch.cuda.current_stream(self._device)
        for slot in slots:
            stream.wait_event(self._copied[slot])
        for matrix in self.matrices.values():
            matrix.record_stream(stream)
        try:
            yield
        finally:
            ended = stream.record_event()
            for slot in slots:
                self._uses[slot][stream] = ended

    def integers(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=True)

    def moved(self, integers: Tensor) -> Tensor:
        return integers.to(self._device, non_blocking=True)


#: Every kind by the device's type.
SLOTS: dict[str, type[Slots]] = {"cpu": _CpuSlots, "cuda": _CudaSlots}
