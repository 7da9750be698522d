"""What does a second thread bring?"""

from __future__ import annotations

import os
from functools import partial

import torch

from benchmarks.clock import Run
from benchmarks.contenders import OURS, DenseBound, inputs, our_layer
from benchmarks.cpu.section import Section, Settings
from benchmarks.markdown import table
from benchmarks.peaks import FMA


def counts() -> list[int]:
    """1, 2, 4 and so on up to the number of cores."""
    cores = os.cpu_count() or 1
    powers = [2**n for n in range(cores.bit_length()) if 2**n < cores]
    return [*powers, cores]


def with_threads(count: int, run: Run) -> float:
    """Runs with so many threads, then gives torch back its own number."""
    usual = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return run()
    finally:
        torch.set_num_threads(usual)


def section_threads(settings: Settings) -> Section:
    """Speed-ups over one thread, ours and those of what bounds it."""
    tried = counts()
    rows: list[list[str]] = []
    for shape in settings.shapes:
        torch.manual_seed(0)
        ours, dense = our_layer(shape, torch.float32), DenseBound(shape, torch.float32)
        step = partial(ours.step, *inputs(shape, torch.float32))
        runs: dict[str, Run] = {}
        for count in tried:
            runs[f"{OURS} {count}"] = partial(with_threads, count, step)
            runs[f"dense {count}"] = partial(with_threads, count, dense.run)
        block = settings.clock.measure(f"threads, {shape}", runs)
        peaks = {count: settings.clock.peaks(count)[FMA] for count in tried}
        for count in tried:
            rows.append(
                [
                    f"{shape}",
                    str(count),
                    f"{1e3 * block.times[f'{OURS} {count}'].low:.1f}",
                    f"{block.ratio(f'{OURS} 1', f'{OURS} {count}'):.2f}",
                    f"{block.ratio('dense 1', f'dense {count}'):.2f}",
                    f"{peaks[count] / peaks[1]:.2f}",
                ]
            )
    header = ["T, H, I, E, K", "threads", "ms a step", "speed-up", "of dense mm", "of FMA peak"]
    return Section(
        "Threads",
        "A step on 1, 2, 4 and so on threads, up to the number of cores, in one process: fastest "
        "rounds and their speed-up over one thread, and that of six dense `torch.mm` and of the "
        "FMA peak, which is the machine's own.",
        [table(header, rows)],
    )
