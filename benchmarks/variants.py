"""One layer with one of its parts exchanged: the command line and the table of such a benchmark."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.contenders import Shape, add_shape_option, positive

SHAPES = (
    Shape(1024, 128, 256, 8, 2),
    Shape(1024, 256, 512, 8, 2),
    Shape(2048, 512, 1024, 8, 2),
    Shape(2048, 512, 256, 64, 8),
)


@dataclass(frozen=True)
class Variant:
    """What the layer takes with one part."""

    name: str
    seconds: float
    flops: int
    """Floating-point operations of its products, forward and backward."""
    peak_bytes: int


def run(
    prog: str,
    description: str,
    measure: Callable[[Shape], Sequence[Variant]],
    arguments: list[str] | None = None,
    *,
    multiple: int = 1,
) -> int:
    """Measures and prints a table for each shape.

    Args:
        prog: how the benchmark is called.
        description: what it times, for --help.
        measure: times all variants of a shape, the yardstick first.
        arguments: of the command line.
        multiple: what the number of tokens must be a multiple of.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    add_shape_option(parser, "four")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="CPU threads (default: torch's)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the numbers, too")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    shapes = options.shape or SHAPES
    for shape in shapes:
        if shape.tokens % multiple:
            parser.error(f"--shape must have a multiple of {multiple} tokens, got {shape.tokens}")
    found = []
    for shape in shapes:
        results = measure(shape)
        print_table(shape, results)
        found.append({"shape": asdict(shape), "results": [asdict(result) for result in results]})
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def print_table(shape: Shape, results: Sequence[Variant]) -> None:
    """One line for each variant, with ratios to the first."""
    sizes = "  ".join(f"{name} {size}" for name, size in asdict(shape).items())
    print(f"\n{sizes}")
    print(f"  {'':24}{'ms':>9}{'ratio':>9}{'FLOPs':>9}{'MiB':>9}{'ratio':>9}")
    first = results[0]
    for one in results:
        print(
            f"  {one.name:24}{1e3 * one.seconds:9.2f}{one.seconds / first.seconds:9.2f}"
            f"{one.flops / first.flops:9.2f}"
            f"{one.peak_bytes / 2**20:9.1f}{one.peak_bytes / first.peak_bytes:9.2f}"
        )
