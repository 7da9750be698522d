"""What does each gradient estimator cost?

Run it as `python -m benchmarks.estimators`. One layer takes every built-in estimator in turn: the
time of a forward and backward pass (the fastest of ten rounds in which they take turns) and the
most memory it holds beyond what it held before, relative to `exact`. The third number is what the
arithmetic alone would lead one to expect: the floating-point operations of the experts' products,
with those that the estimator adds, over those of the layer.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from benchmarks.contenders import Shape
from benchmarks.variants import Variant, run
from torchmoe.nn import MoE
from torchmoe.testing import compare_estimators


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints a table for each shape."""
    return run(
        "python -m benchmarks.estimators",
        "Times one MoE layer, forward + backward, with each gradient estimator.",
        measure,
        arguments,
    )


def measure(shape: Shape) -> list[Variant]:
    """Every built-in estimator on a new layer and random tokens."""
    torch.manual_seed(0)
    moe = MoE(shape.hidden, shape.intermediate, shape.experts, shape.top_k)
    x = torch.randn(shape.tokens, shape.hidden)
    direction = torch.randn(shape.tokens, shape.hidden)

    def loss(hidden_states: Tensor, batch: Tensor) -> Tensor:
        del batch
        return (hidden_states * direction).sum()

    return [
        Variant(one.name, one.seconds, shape.flops + added_flops(one.name, shape), one.peak_bytes)
        for one in compare_estimators(moe, [x], loss, seeds=1, warm_up=1).results
    ]


def added_flops(name: str, shape: Shape) -> int:
    """Floating-point operations that an estimator's products add to the layer's."""
    tokens, hidden, experts = shape.tokens, shape.hidden, shape.experts
    if name == "straight_through_dense":  # every expert once for every token
        return 6 * tokens * experts * hidden * shape.intermediate
    if name == "default_vector":  # scores times default vectors, and its derivative
        return 4 * tokens * experts * hidden
    return 0


if __name__ == "__main__":
    sys.exit(main())
