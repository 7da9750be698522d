"""What does a 16-bit type cost, or save?"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.clock import Run
from benchmarks.contenders import inputs, our_layer
from benchmarks.cpu.section import Section, Settings
from benchmarks.markdown import table
from benchmarks.moe_layer import DTYPES


def section_dtypes(settings: Settings) -> Section:
    """The time of a step by type."""
    instructions = settings.clock.peaks.instructions
    rows: list[list[str]] = []
    for shape in settings.shapes:
        runs: dict[str, Run] = {}
        for name, dtype in DTYPES.items():
            torch.manual_seed(0)
            ours = our_layer(shape, dtype)
            runs[name] = partial(ours.step, *inputs(shape, dtype))
        block = settings.clock.measure(f"types, {shape}", runs)
        ratios = [block.ratio(name, "float32") for name in DTYPES if name != "float32"]
        low = [f"{1e3 * block.times[name].low:.1f}" for name in DTYPES]
        shares = [
            shape.flops / block.times[name].low / block.peak(instructions.peak_of(dtype))
            for name, dtype in DTYPES.items()
        ]
        rows.append(
            [
                f"{shape}",
                *low,
                *(f"{ratio:.2f}" for ratio in ratios),
                *(f"{share:.3f}" for share in shares),
            ]
        )
    header = [
        "T, H, I, E, K",
        *(f"{name} ms" for name in DTYPES),
        *("bfloat16", "float16"),
        *(f"U {name}" for name in DTYPES),
    ]
    return Section(
        "16-bit types",
        "A step of the layer by the type of tokens and parameters, fastest rounds: milliseconds, "
        f"the time over that in float32, and U, the share of the peak ({instructions}). "
        "`make bench ARGS='--dtype bfloat16'` adds the peers.",
        [table(header, rows)],
    )
