"""How much memory a function takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_LOG_LEVEL = "KINETO_LOG_LEVEL"


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """The most memory that torch's allocator holds for run() at one time.

    On the CPU what a kernel allocates on another thread than its caller's is not seen.
    """
    if device.type == "cuda":
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - start
    with _quiet(), torch.autograd.profiler.profile(profile_memory=True) as profiler:
        run()
    # profiler.function_events adds up what an op allocates and frees; these are the single events.
    recorded = profiler.kineto_results.events()
    held = peak = 0
    for event in sorted(recorded, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's profiler from writing to stderr when it starts and stops.

    It asks the environment once, when it is first used; whoever has set a level keeps it.
    """
    if _LOG_LEVEL in os.environ:
        yield
        return
    os.environ[_LOG_LEVEL] = "99"  # above all that it has
    try:
        yield
    finally:
        del os.environ[_LOG_LEVEL]
