"""What reading the experts' weights takes, without anything else: the bound of a few tokens.

A forward pass reads the matrices of each expert that a token chose, once; a backward pass reads
them again and writes the gradients of all. `WeightReads` and `GradientWrites` do that to memory of
their own, as large and laid out like the layer's, so that in a block their memory is as warm as a
contender's. `OpAlone` is the layer without its router: what the op adds to the bound.
"""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor

import torchmoe
from benchmarks.contenders import OURS, Contender, Shape
from benchmarks.peaks import LINE, Peaks
from torchmoe import ops

READS, OP = "reading the weights", f"{OURS} expert_mlp"


def routed(layer: torchmoe.nn.MoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """The experts [T, K] that a layer's router chooses, and their weights."""
    logits = ops.router_logits(x, layer.router.get_parameter("weight"))
    indices = ops.select_experts(logits, layer.top_k)
    normalize = "topk" if layer.top_k > 1 else "none"  # a single weight is always 1
    weights = ops.gate_weights(
        logits, indices, score_function="softmax", normalize=normalize, estimator="exact"
    )
    return indices, weights


def touched(layer: torchmoe.nn.MoE, x: Tensor) -> Tensor:
    """The ids of the experts that at least one token chooses, ascending."""
    with torch.inference_mode():
        return routed(layer, x)[0].flatten().bincount().nonzero().flatten()


def matrices(layer: torchmoe.nn.MoE) -> tuple[Tensor, Tensor]:
    """W_in [E, 2 * I, H] and W_out [E, H, I]."""
    w_in = layer.get_parameter("experts.gate_up_proj")
    return w_in, layer.get_parameter("experts.down_proj")


def bytes_of_expert(shape: Shape, dtype: torch.dtype) -> int:
    """The size of an expert's two matrices."""
    return 3 * shape.hidden * shape.intermediate * dtype.itemsize


def memory_for(shape: Shape, dtype: torch.dtype) -> Tensor:
    """A row of whole lines for each expert, int8 [E, *]."""
    lines = -(-bytes_of_expert(shape, dtype) // LINE)
    found = torch.empty(shape.experts * lines * LINE + LINE, dtype=torch.int8)
    first = -found.data_ptr() % LINE
    # Ones, because pages that nobody wrote share one page of zeros.
    return found[first : first + shape.experts * lines * LINE].view(shape.experts, -1).fill_(1)


class WeightReads:
    """Reads the matrices of the experts that the tokens choose, each once."""

    def __init__(self, shape: Shape, ours: Contender, peaks: Peaks) -> None:
        """Allocates as much as the layer has."""
        self._layer = our_module(ours)
        self._memory = memory_for(shape, next(self._layer.parameters()).dtype)
        self._peaks = peaks

    def infer(self, x: Tensor) -> float:
        """Seconds for these tokens."""
        return self._peaks.read(self._memory, touched(self._layer, x))


class GradientWrites:
    """Writes the gradients of all experts' matrices, each once."""

    def __init__(self, shape: Shape, dtype: torch.dtype, peaks: Peaks) -> None:
        """Allocates as much as the layer's gradients have."""
        self._memory = memory_for(shape, dtype)
        self._peaks = peaks

    def run(self) -> float:
        """Seconds for all."""
        return self._peaks.write(self._memory)


class OpAlone:
    """`expert_mlp` with the choices of the layer's router, which are made before the clock runs."""

    def __init__(self, ours: Contender) -> None:
        """Copies the layer, so that its weights are as warm as any contender's."""
        self._layer = copy.deepcopy(our_module(ours))

    def infer(self, x: Tensor) -> float:
        """Seconds of one forward pass without a gradient to come."""
        w_in, w_out = matrices(self._layer)
        with torch.inference_mode():
            indices, weights = routed(self._layer, x)
            start = time.perf_counter()
            ops.expert_mlp(x, indices, weights, w_in, None, w_out, None, "swiglu")
            return time.perf_counter() - start


def our_module(ours: Contender) -> torchmoe.nn.MoE:
    """The layer of `contenders.our_layer`."""
    assert isinstance(ours.module, torchmoe.nn.MoE)
    return ours.module
