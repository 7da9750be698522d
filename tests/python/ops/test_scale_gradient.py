"""scale_gradient: the identity, with a scaled gradient."""

from __future__ import annotations

import torch

import reference
import torchmoe
from gradient_harness import DifferentiableOpTests
from op_case import ErrorCase, Inputs, OpCase, altered, run, wide_dtype
from situations import SITUATIONS, Situation, normal


def make(s: Situation, dtype: torch.dtype, scale: str) -> Inputs:
    shape = {"rows": (s.T, 1), "columns": (s.H,), "scalar": (), "full": (s.T, s.H)}[scale]
    return {"x": normal(s.T, s.H, dtype=dtype), "scale": normal(*shape, dtype=wide_dtype(dtype))}


class TestScaleGradient(DifferentiableOpTests):
    case = OpCase(
        name="scale_gradient",
        schema="scale_gradient(Tensor x, Tensor scale) -> Tensor",
        make=make,
        reference=reference.scale_gradient,
        wrapper=lambda inputs: torchmoe.ops.scale_gradient(**inputs),
        situations=("plain", "one_token", "no_tokens", "large"),
        variants=({"scale": "rows"}, {"scale": "columns"}, {"scale": "scalar"}, {"scale": "full"}),
        differentiable=("x",),
        is_derivative=lambda inputs: False,
        gradient_roundings=1,  # scale in x's type
        errors=(
            ErrorCase("x", altered("x", lambda x: x.long()), "Long"),
            ErrorCase("scale", altered("scale", lambda s: s.long()), "Long"),
            ErrorCase("scale", altered("scale", lambda s: s[1:]), r"\[5, 1\]"),
            ErrorCase("scale", altered("scale", lambda s: s[None]), r"\[1, 6, 1\]"),
            ErrorCase("scale", altered("x", lambda x: x[:1]), r"\[6, 1\]"),
        ),
    )

    def test_the_value_is_a_copy_bit_for_bit(self) -> None:
        x = torch.tensor([1.0, -0.0, torch.nan, torch.inf, 1e-45])
        y = torchmoe.ops.scale_gradient(x, torch.tensor(0.5))
        assert torch.equal(y.view(torch.int32), x.view(torch.int32))
        assert y.data_ptr() != x.data_ptr()

    def test_scale_gets_no_gradient(self) -> None:
        inputs = make(SITUATIONS["plain"], torch.float32, "rows")
        x, scale = inputs["x"].requires_grad_(), inputs["scale"].requires_grad_()
        y = torchmoe.ops.scale_gradient(x, scale)
        grads = torch.autograd.grad(y.sum(), [x, scale], allow_unused=True)
        assert torch.equal(grads[0], scale.detach().expand(6, 5))
        assert grads[1] is None or not grads[1].any()

    def test_usage_scaled_router(self) -> None:
        weight = normal(4, 5)
        usage = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
        inputs = {"x": weight, "scale": 1 - usage[:, None]}
        _, (grad,) = run(lambda i: (self.case(i)[0] * 3,), inputs, ("x",))
        plain = run(lambda i: (i["x"] * 3,), inputs, ("x",))[1][0]
        torch.testing.assert_close(grad, plain * (1 - usage[:, None]))

    def test_zero_scale_is_a_zero_gradient(self) -> None:
        x = torch.randn(3, requires_grad=True)
        torchmoe.ops.scale_gradient(x, torch.tensor(0.0)).sum().backward()
        assert torch.equal(x.grad, torch.zeros(3))
