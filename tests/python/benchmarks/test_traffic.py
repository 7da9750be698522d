"""What the bound of a few tokens reads."""

from __future__ import annotations

import pytest
import torch

from benchmarks.contenders import Shape, inputs, our_layer
from benchmarks.peaks import LINE
from benchmarks.traffic import (
    GradientWrites,
    WeightReads,
    bytes_of_expert,
    memory_for,
    our_module,
    routed,
    touched,
)
from steady_machine import SteadyPeaks

SHAPE = Shape(3, 32, 16, 8, 2)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_routing_is_the_layers(top_k: int) -> None:
    shape = Shape(3, 32, 16, 8, top_k)
    layer = our_module(our_layer(shape, torch.float32))
    x, _ = inputs(shape, torch.float32)
    routing = layer(x).routing
    indices, weights = routed(layer, x)
    assert torch.equal(indices, routing.indices)
    assert torch.equal(weights, routing.weights)
    assert touched(layer, x).tolist() == sorted(set(routing.indices.flatten().tolist()))


def test_the_bytes_are_those_of_the_parameters() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = our_layer(SHAPE, dtype).module
        experts = [layer.get_parameter(f"experts.{name}") for name in ("gate_up_proj", "down_proj")]
        assert bytes_of_expert(SHAPE, dtype) == sum(matrix[0].nbytes for matrix in experts)


def test_the_bound_reads_the_experts_that_the_tokens_choose() -> None:
    ours, peaks = our_layer(SHAPE, torch.bfloat16), SteadyPeaks(1)
    reads = WeightReads(SHAPE, ours, peaks)
    for _ in range(3):
        x, _ = inputs(SHAPE, torch.bfloat16)
        chosen = touched(our_module(ours), x).tolist()
        assert reads.infer(x) == len(chosen) * bytes_of_expert(SHAPE, torch.bfloat16)
        assert peaks.read_rows[-1] == chosen


def test_all_gradients_are_written() -> None:
    shape = Shape(1, 5, 7, 3, 1)  # 420 bytes for each expert, in lines of 64
    memory = memory_for(shape, torch.float32)
    assert memory.shape == (3, 7 * LINE)
    assert memory.data_ptr() % LINE == 0
    assert GradientWrites(shape, torch.float32, SteadyPeaks(1)).run() == 3 * 7 * LINE
