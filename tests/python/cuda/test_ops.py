"""Every op on the GPU: the checklist of ops/, with the same inputs and the same references.

What lies above the kernels (double backward, what a compiler makes of an op) is the same as on the
CPU and left to the tests there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from on_device import (
    busy_device,
    forward_backward,
    no_host_sync,
    on_cpu,
    on_device,
    op_tests,
    prepared,
)
from op_case import Inputs, OpCase, assert_same
from op_harness import OpTests
from situations import SITUATIONS, THREADS, Situation

pytestmark = [
    pytest.mark.cuda,
    # What a GPU's torch warns of is not an error of this library.
    pytest.mark.filterwarnings("default"),
]

CHECKLIST = (
    "test_any_strides",
    "test_any_strides_of_the_gradient",
    "test_autocast",
    "test_autocast_gradients_keep_their_types",
    "test_checkpointing_gives_equal_gradients",
    "test_devices_must_agree",
    "test_errors",
    "test_forward_is_the_reference",
    "test_gradients_are_the_reference",
    "test_inference_mode_gives_the_same",
    "test_inputs_are_left_alone",
    "test_more_than_one_block",
    "test_nonfinite_values_stay_in_their_token",
    "test_opcheck_of_the_private_ops",
    "test_opcheck_with_gradients",
    "test_poison_where_nothing_is_routed",
    "test_strides_of_differentiable_inputs",
    "test_uninitialised_memory_stays_inside",
    "test_wrapper_is_the_op",
)

# Finite differences where the derivative is the op's own and not torch's.
GRADCHECKED = ("expert_mlp", "gate_weights")

# So skewed that most experts idle, and so many that no warp and no block holds them.
SKEWED = Situation("skewed", routing="one_expert", T=300, H=24, I=40, E=300, K=1)


class CudaTests(OpTests):
    """What an op must keep on a GPU, in addition to the checklist."""

    def test_integers_and_shapes_are_the_cpu_ops(self, variant: Inputs) -> None:
        for name in self.case.situations:
            for dtype in self.case.dtypes:
                inputs = self.case.make(SITUATIONS[name], dtype, **variant)
                for a, e in zip(self.case(inputs), self.case(on_cpu(inputs)), strict=True):
                    assert (a.dtype, a.shape, a.stride()) == (e.dtype, e.shape, e.stride())
                    assert e.is_floating_point() or torch.equal(a.cpu(), e)

    def test_opcheck_of_every_situation(self, situation: Situation) -> None:
        if situation.name in ("plain", "one_token", "no_tokens", "out_of_range"):
            OpTests.test_opcheck(self, situation)

    def test_two_runs_are_equal(self, variant: Inputs) -> None:
        """Alone and at the same time as kernels that fill the device."""
        wanted = (torch.float32, torch.bfloat16)
        for situation in (THREADS, SKEWED):
            for dtype in [t for t in wanted if t in self.case.dtypes] or self.case.dtypes:
                inputs = self.case.make(situation, dtype, **variant)
                function, names, given = prepared(self.case, inputs)
                first = forward_backward(function, inputs, names, given)
                alone = [forward_backward(function, inputs, names, given) for _ in range(3)]
                with busy_device():
                    beside = [forward_backward(function, inputs, names, given) for _ in range(3)]
                for result in alone + beside:
                    assert_same(result, first)

    def test_never_waits_for_the_device(self, variant: Inputs) -> None:
        inputs = self.case.make(SITUATIONS["large"], self.case.dtypes[0], **variant)
        function, names, given = prepared(self.case, inputs)
        expected = forward_backward(function, inputs, names, given)
        with no_host_sync():
            actual = forward_backward(function, inputs, names, given)
        assert_same(actual, expected)

    def test_a_cpu_tensor_is_refused(self, real_device: torch.device) -> None:
        if self.case.name == "attach_loss":
            pytest.skip("the loss only gets its gradient, on its own device")
        inputs = self.case.make(SITUATIONS["plain"], self.case.dtypes[0], **self.case.variants[0])
        first, *others = [name for name, v in inputs.items() if isinstance(v, Tensor)]
        for name in others:
            message = (
                rf"^{self.case.name}: {name} must be on the device of {first} "
                rf"\({real_device}\), got cpu"
            )
            with pytest.raises(RuntimeError, match=message):
                self.case(inputs | {name: inputs[name].cpu()})

    def test_a_side_stream(self, variant: Inputs, real_device: torch.device) -> None:
        """Inputs that arrive late on a stream are waited for by what runs on that stream."""
        inputs = self.case.make(SITUATIONS["large"], self.case.dtypes[0], **variant)
        function, names, given = prepared(self.case, inputs)
        expected = forward_backward(function, inputs, names, given)
        late = {k: torch.zeros_like(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        stream = torch.cuda.Stream(real_device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # some 10 ms
            for name, value in inputs.items():
                if isinstance(value, Tensor):
                    late[name].copy_(value, non_blocking=True)
            actual = forward_backward(function, late, names, given)
        stream.synchronize()
        assert_same(actual, expected)

    def test_another_device(self, variant: Inputs, real_device: torch.device) -> None:
        del real_device
        if torch.cuda.device_count() < 2:
            pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}")
        inputs = self.case.make(SITUATIONS["large"], self.case.dtypes[0], **variant)
        function, names, given = prepared(self.case, inputs)
        expected = forward_backward(function, inputs, names, given)
        there = {k: v.to("cuda:1") if isinstance(v, Tensor) else v for k, v in inputs.items()}
        given = tuple(g.to("cuda:1") for g in given)
        actual = forward_backward(function, there, names, given)
        assert all(a.device == torch.device("cuda:1") for a in actual)
        assert_same(tuple(a.to("cuda:0") for a in actual), expected)


def with_cuda(tests: type[OpTests]) -> type[OpTests]:
    """The op's own class with the tests of CHECKLIST and CudaTests, on the device under test."""
    case: OpCase = tests.case
    chosen = CHECKLIST + (("test_gradcheck",) if case.name in GRADCHECKED else ())
    others = [n for n in dir(tests) if n.startswith("test_") and n not in chosen]
    members: dict[str, Any] = dict.fromkeys(others)
    members |= {name: value for name, value in vars(CudaTests).items() if name.startswith("test_")}
    members["case"] = on_device(case)
    return type(tests.__name__, (tests,), members)


for _tests in op_tests():
    globals()[_tests.__name__] = with_cuda(_tests)
