"""What does each gradient estimator cost?

Run it as `python -m benchmarks.estimators`. One layer takes every built-in estimator in turn: the
time of a forward and backward pass (the fastest of ten rounds in which they take turns) and the
most memory it holds beyond what it held before, beside `exact`. The third number is what the
arithmetic alone would lead one to expect: the floating-point operations of the experts' products,
with those that the estimator adds, over those of the layer.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.contenders import Shape
from torchmoe.nn import MoE
from torchmoe.testing import EstimatorResult, compare_estimators

SHAPES = (
    Shape(1024, 128, 256, 8, 2),
    Shape(1024, 256, 512, 8, 2),
    Shape(2048, 512, 1024, 8, 2),
    Shape(2048, 512, 256, 64, 8),
)


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints a table for each shape."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.estimators",
        description="Times one MoE layer, forward + backward, with each gradient estimator.",
    )
    parser.add_argument(
        "--shape",
        type=Shape.parse,
        action="append",
        metavar="T,H,I,E,K",
        help="tokens, hidden, intermediate, experts, top-k; may be repeated (default: four)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the numbers, too")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    found = []
    for shape in options.shape or SHAPES:
        results = measure(shape)
        print_table(shape, results)
        found.append({"shape": asdict(shape), "results": [asdict(result) for result in results]})
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def measure(shape: Shape) -> tuple[EstimatorResult, ...]:
    """Every built-in estimator on a new layer and random tokens."""
    torch.manual_seed(0)
    moe = MoE(shape.hidden, shape.intermediate, shape.experts, shape.top_k)
    x = torch.randn(shape.tokens, shape.hidden)
    direction = torch.randn(shape.tokens, shape.hidden)

    def loss(hidden_states: Tensor, batch: Tensor) -> Tensor:
        del batch
        return (hidden_states * direction).sum()

    return compare_estimators(moe, [x], loss, seeds=1, warm_up=1).results


def added_flops(name: str, shape: Shape) -> int:
    """Floating-point operations that an estimator's products add to the layer's."""
    tokens, hidden, experts = shape.tokens, shape.hidden, shape.experts
    if name == "straight_through_dense":  # every expert once for every token
        return 6 * tokens * experts * hidden * shape.intermediate
    if name == "default_vector":  # scores times default vectors, and its derivative
        return 4 * tokens * experts * hidden
    return 0


def print_table(shape: Shape, results: tuple[EstimatorResult, ...]) -> None:
    """One line for each estimator, with ratios to the first."""
    sizes = "  ".join(f"{name} {size}" for name, size in asdict(shape).items())
    print(f"\n{sizes}")
    print(f"  {'':24}{'ms':>9}{'ratio':>9}{'FLOPs':>9}{'MiB':>9}{'ratio':>9}")
    first = results[0]
    for one in results:
        print(
            f"  {one.name:24}{1e3 * one.seconds:9.2f}{one.seconds / first.seconds:9.2f}"
            f"{1 + added_flops(one.name, shape) / shape.flops:9.2f}"
            f"{one.peak_bytes / 2**20:9.1f}{one.peak_bytes / first.peak_bytes:9.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
