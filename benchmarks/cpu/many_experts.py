"""How near is a step of many small experts to the time that its weights take to move?"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.clock import Run
from benchmarks.contenders import OURS, Shape, inputs, our_layer
from benchmarks.cpu.section import Section, Settings
from benchmarks.markdown import table
from benchmarks.moe_layer import DTYPES
from benchmarks.traffic import (
    READS,
    GradientWrites,
    WeightReads,
    bytes_of_expert,
    our_module,
    touched,
)

SHAPE, REHEARSED = Shape(4096, 256, 128, 1024, 1), Shape(256, 256, 128, 64, 1)
WRITES = "writing the gradients"
DIRECTIONS = 2  # each reads the weights once


def row_of(shape: Shape, dtype_name: str, settings: Settings) -> list[str]:
    """A line of the table."""
    torch.manual_seed(0)
    dtype = DTYPES[dtype_name]
    ours = our_layer(shape, dtype)
    x, grad = inputs(shape, dtype)
    runs: dict[str, Run] = {
        OURS: partial(ours.step, x, grad),
        READS: partial(WeightReads(shape, ours, settings.clock.peaks).infer, x),
        WRITES: GradientWrites(shape, dtype, settings.clock.peaks).run,
    }
    times = settings.clock.measure(f"many experts, {dtype_name}", runs).times
    each, chosen = bytes_of_expert(shape, dtype), len(touched(our_module(ours), x))
    moved = {READS: each * chosen, WRITES: each * shape.experts}
    bound = DIRECTIONS * times[READS].low + times[WRITES].low
    rates = [moved[name] / times[name].low / 1e9 for name in (READS, WRITES)]
    return [
        dtype_name,
        f"{chosen:,}",
        *(f"{rate:.0f}" for rate in rates),
        f"{1e3 * bound:.1f}",
        f"{1e3 * times[OURS].low:.1f}",
        f"{times[OURS].low / bound:.2f}",
    ]


def section_many_experts(settings: Settings) -> Section:
    """A step over the time that its weights and their gradients take to move."""
    shape = REHEARSED if settings.quick else SHAPE
    rows = [row_of(shape, name, settings) for name in ("float32", "bfloat16")]
    header = ["", "experts chosen", "read GB/s", "write GB/s", "bound ms", "ms", "over the bound"]
    return Section(
        "Many experts",
        f"A step of T, H, I, E, K = {shape}, fastest rounds. With hardly a row for each expert it "
        "is bound by memory: the bound is the time to read the matrices of the experts that were "
        "chosen twice, once in each direction, and to write the gradients of all once, past the "
        "caches and to memory that the process has already. GB/s are those of the bound.",
        [table(header, rows)],
    )
