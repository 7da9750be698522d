"""How much memory a function takes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, chain

import torch
from torch._C._autograd import _disable_profiler_legacy, _enable_profiler_legacy
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """The most memory that torch's allocator holds for run() at one time.

    On the CPU what a kernel allocates on another thread than its caller's is not seen.
    """
    if device.type == "cuda":
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - start
    # Kineto, the other profiler, writes a line to stderr whenever it starts or stops.
    config = ProfilerConfig(
        ProfilerState.CPU,
        report_input_shapes=False,
        profile_memory=True,
        with_stack=False,
        with_flops=False,
        with_modules=False,
        experimental_config=_ExperimentalConfig(),
    )
    _enable_profiler_legacy(config)
    try:
        run()
    finally:
        events = _disable_profiler_legacy()  # one list for each thread
    # An allocation counts its bytes, a release the same below 0, and what is neither counts 0.
    return max(accumulate((e.cpu_memory_usage() for e in chain(*events)), initial=0))
