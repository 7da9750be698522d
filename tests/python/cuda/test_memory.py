"""Where the memory comes from, and how much of it is held."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from on_device import LAYERS, LayerStep, forward_backward, moved, op_tests, prepared
from op_case import leaves
from situations import EXPERT_WEIGHTS, THREADS, Situation, expert_weights, normal
from torchmoe import ops

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("real_device"),
]


def taken_from_the_driver() -> int:
    """Bytes of the device that are in use and not torch's allocator's."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def test_all_memory_comes_from_torchs_allocator() -> None:
    """Once kernels are loaded, which takes memory of the driver's own."""
    runs = []
    for tests in op_tests():
        case = tests.case
        for variant in case.variants:
            for dtype in case.dtypes:
                inputs = moved(case.make(THREADS, dtype, **variant))
                runs.append((inputs, *prepared(case, inputs)))
    steps = [LayerStep(name, torch.bfloat16) for name in LAYERS]

    def everything() -> None:
        for inputs, function, names, given in runs:
            forward_backward(function, inputs, names, given)
        for step in steps:
            step()

    everything()
    before = taken_from_the_driver()
    everything()
    torch.cuda.empty_cache()
    everything()
    assert taken_from_the_driver() == before


def requested() -> int:
    """Bytes of all live tensors, as they were asked for and not as they were rounded up."""
    gc.collect()
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


def size_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_expert_mlp_holds_pre_activations_and_integers(activation: str, dtype: torch.dtype) -> None:
    """Besides its inputs and output: N * P elements, E + 1 offsets, 2 N rows and slots."""
    s = Situation("memory", routing="dropped", T=512, H=256, I=64, E=16, K=4)
    inputs = moved(
        {
            "x": normal(s.T, s.H, dtype=dtype),
            "indices": s.indices(),
            "weights": normal(s.T, s.K, dtype=torch.float32),
            **expert_weights(s, dtype, activation, bias=True),
        }
    )
    names = ("x", "weights", *EXPERT_WEIGHTS)
    inputs = leaves(inputs, names)

    def forward() -> Tensor:
        return ops.expert_mlp(**inputs, activation=activation)

    grad = torch.ones_like(inputs["x"])
    torch.autograd.grad(forward(), [inputs[n] for n in names], grad)
    before = requested()
    y = forward()
    rows, width = s.T * s.K, inputs["w_in"].size(1)
    pre = rows * width * dtype.itemsize
    integers = 8 * (s.E + 1 + 2 * rows)
    held = requested() - before
    assert pre + size_of(y) <= held <= pre + size_of(y) + integers
    grads = torch.autograd.grad(y, [inputs[n] for n in names], grad)
    # The graph is freed: what is left is the output and the gradients.
    assert requested() - before == size_of(y, *grads)
    with torch.no_grad():
        alone = forward()
    assert requested() - before == size_of(y, alone, *grads)
