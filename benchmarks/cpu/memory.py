"""How much memory does a step take beyond what it must?"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import Shape, inputs, our_layer
from benchmarks.cpu.section import Section, Settings
from benchmarks.markdown import table

MIB = 2**20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGE = 65536  # bytes: what is as large goes back to the system when it is freed


@dataclass(frozen=True)
class Usage:
    """Bytes that a call took."""

    result: Any
    peak: int  # above what was there before
    kept: int  # what is there afterwards


@dataclass(frozen=True)
class Transient:
    """Bytes of the passes beyond their inputs, their results and the saved set."""

    forward: int
    backward: int

    @property
    def larger(self) -> int:
        """Of the two."""
        return max(self.forward, self.backward)


def allocated(call: Callable[[], Any]) -> Usage:
    """By torch's allocator, which knows of tensors alone."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    found: Any = profiler.profiler  # its results have no types
    level = peak = 0
    events = (event for event in found.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return Usage(result, peak, level)


def can_watch_process() -> bool:
    """Whether the system tells a process's largest size, and freed memory can leave it at once.

    Memory that stays with the process when it is freed would hide what the next pass takes.
    """
    if platform.system() != "Linux" or not os.access("/proc/self/clear_refs", os.W_OK):
        return False
    library = ctypes.CDLL(None)
    return hasattr(library, "mallopt") and all(
        library.mallopt(parameter, LARGE) == 1 for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD)
    )


def resident(call: Callable[[], Any]) -> Usage:
    """By the size of the process, where `can_watch_process`: everything counts, in pages."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the largest size
    before = process_size("VmRSS")
    result = call()
    return Usage(result, process_size("VmHWM") - before, process_size("VmRSS") - before)


def process_size(key: str) -> int:
    """Bytes: VmRSS is now, VmHWM the largest."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def saved_bytes(forward: Callable[[], object], layer: nn.Module) -> int:
    """What the graph of a forward pass holds, each memory once and parameters not."""
    held = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result  # until here, so that no memory is used for a second tensor
    return sum(found.values())


def transient(
    usage_of: Callable[[Callable[[], Any]], Usage], layer: nn.Module, x: Tensor, grad: Tensor
) -> Transient:
    """A step by one of the two measures."""
    leaves = [x, *layer.parameters()]
    for leaf in leaves:
        leaf.grad = None
    forward = usage_of(lambda: layer(x))
    y = forward.result.hidden_states
    backward = usage_of(lambda: torch.autograd.backward([y], [grad]))
    gradients = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    return Transient(forward.peak - forward.kept, max(0, backward.peak - gradients))


def row_of(shape: Shape, watched: bool) -> list[str]:
    """A line of the table."""
    torch.manual_seed(0)
    ours = our_layer(shape, torch.float32)
    x, grad = inputs(shape, torch.float32)
    ours.step(x, grad)  # what stays from a first step on is not of a step
    saved = saved_bytes(lambda: ours.module(x), ours.module)
    row = [f"{shape}", f"{saved / MIB:.1f}"]
    row += cells(transient(allocated, ours.module, x, grad), saved)
    if watched:
        row += cells(transient(resident, ours.module, x, grad), saved)
    return row


def cells(found: Transient, saved: int) -> list[str]:
    """Both directions, and the larger over the saved set."""
    mib = [f"{size / MIB:.1f}" for size in (found.forward, found.backward)]
    return [*mib, f"{found.larger / saved:.2f}"]


def rows_of(shapes: Sequence[Shape]) -> tuple[bool, list[list[str]]]:
    """The lines of the table, and whether the process was watched, too."""
    watched = can_watch_process()
    return watched, [row_of(shape, watched) for shape in shapes]


def section_memory(settings: Settings) -> Section:
    """The saved set, and what comes and goes.

    In a process of its own, which has freed no memory that a pass could use again, and to which
    alone the thresholds apply: where freed memory leaves at once, everything takes longer.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as another:
        watched, rows = another.submit(rows_of, settings.shapes).result()
    header = ["T, H, I, E, K", "saved MiB", "forward MiB", "backward MiB", "over saved"]
    about = (
        "A step in float32. Saved is what the graph holds for the backward pass (the tensors that "
        "`saved_tensors_hooks` sees, x among them, parameters not). The rest is transient: the "
        "peak of a pass beyond its inputs, its results, gradients among them, and the saved set, "
        "in tensors as torch's profiler counts them"
    )
    if watched:
        header += ["forward, resident", "backward, resident", "over saved"]
        about += (
            "; then by the peak size of the process, which sees the kernels' own memory too, and "
            "that saved tensors are freed during the backward pass"
        )
    return Section("Memory", f"{about}.", [table(header, rows)])
