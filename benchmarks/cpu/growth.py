"""How does time grow with tokens, experts and choices?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from benchmarks import figures
from benchmarks.clock import Run
from benchmarks.contenders import Shape, inputs, our_layer
from benchmarks.cpu.section import Section, Settings
from benchmarks.markdown import table

TOKENS = tuple(Shape(tokens, 64, 128, 8, 2) for tokens in (256, 1024, 4096, 16384, 65536))
EXPERTS = tuple(Shape(8192, 64, 64, experts, 2) for experts in (2, 8, 32, 128, 512))
CHOICES = tuple(Shape(4096, 64, 128, 32, top_k) for top_k in (1, 2, 4, 8, 16))


def times_of(title: str, shapes: Sequence[Shape], settings: Settings) -> list[float]:
    """Seconds of a step at each, in one block."""
    runs: dict[str, Run] = {}
    for shape in shapes:
        torch.manual_seed(0)
        runs[str(shape)] = partial(
            our_layer(shape, torch.float32).step, *inputs(shape, torch.float32)
        )
    return [times.low for times in settings.clock.measure(title, runs).times.values()]


def section_growth(settings: Settings) -> Section:
    """Time over work, which stays the same where growth is linear."""
    parts: list[str] = []
    curves: dict[str, tuple[list[int], list[float], bool]] = {}
    for title, key, shapes, grows in (
        ("T tokens", "tokens", TOKENS, True),
        ("E experts, the work fixed", "experts", EXPERTS, False),
        ("K choices", "top_k", CHOICES, True),
    ):
        tried = shapes[:3] if settings.quick else shapes
        seconds = times_of(title, tried, settings)
        sizes = [int(getattr(shape, key)) for shape in tried]
        per_flop = [time / shape.flops for time, shape in zip(seconds, tried, strict=True)]
        first = tried[0]
        fixed = ", ".join(
            f"{letter} = {value}"
            for letter, name, value in (
                ("T", "tokens", first.tokens),
                ("H", "hidden", first.hidden),
                ("I", "intermediate", first.intermediate),
                ("E", "experts", first.experts),
                ("K", "top_k", first.top_k),
            )
            if name != key
        )
        rows = [
            [
                f"{size:,}",
                f"{1e3 * time:.2f}",
                f"{1e12 * cost:.2f}",
                f"{cost / per_flop[1]:.2f}",
                f"{shape.rows // shape.experts:,}",
            ]
            for size, time, cost, shape in zip(sizes, seconds, per_flop, tried, strict=True)
        ]
        header = [title.partition(" ")[0], "ms", "ps per FLOP", "over the second", "rows an expert"]
        parts += [f"{title}; {fixed}:", table(header, rows, texts=0)]
        curves[f"{title}\n{fixed}"] = (sizes, seconds, grows)
    return Section(
        "Growth",
        "A step of a small layer against tokens, experts and choices, fastest rounds of one block "
        "each. Time over work stays the same where growth is linear; with the work fixed, more "
        "experts have more weights to read and gradients to write.",
        parts,
        {"cpu_growth.png": figures.growth(curves)},
    )
