"""The arithmetic of the walkthrough, on lists."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from walkthrough.made_up import GATE_BIAS, GATE_WEIGHT, INNER_SIZE, make_layer, make_router

Vector = list[float]


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(values: Sequence[float]) -> Vector:
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def logits_of(
    x: Sequence[float],
    weight: Sequence[Sequence[float]] = GATE_WEIGHT,
    bias: Sequence[float] = GATE_BIAS,
) -> Vector:
    return [dot(row, x) + b for row, b in zip(weight, bias, strict=True)]


def near(expected: object) -> object:
    """Equal to what float64 leaves of it, numbers or lists of numbers."""
    return pytest.approx(expected, rel=1e-12, abs=1e-12)


def swiglu(expert: int, x: Sequence[float]) -> Vector:
    """What an expert of the story's layer answers, by hand."""
    layer = make_layer(make_router(usage_scaling=False), balance_weight=0.0)
    both = [dot(row, x) for row in layer.experts.gate_up_proj[expert].tolist()]
    gates, ups = both[:INNER_SIZE], both[INNER_SIZE:]
    inner = [gate / (1 + math.exp(-gate)) * up for gate, up in zip(gates, ups, strict=True)]
    return [dot(row, inner) for row in layer.experts.down_proj[expert].tolist()]
