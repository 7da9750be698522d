"""router_logits: the router's linear map."""

from __future__ import annotations

import torch

import reference
import torchmoe
from gradient_harness import DifferentiableOpTests
from op_case import Autocast, ErrorCase, Inputs, OpCase, altered, wide_dtype
from situations import SITUATIONS, Situation, normal


def make(s: Situation, dtype: torch.dtype, bias: bool) -> Inputs:
    return {
        "x": normal(s.T, s.H, dtype=dtype),
        "weight": normal(s.E, s.H, dtype=dtype),
        "bias": normal(s.E, dtype=dtype) if bias else None,
    }


def private(inputs: Inputs) -> list[tuple[str, Inputs]]:
    x, weight = inputs["x"], inputs["weight"]
    grad = normal(len(x), len(weight), dtype=wide_dtype(x.dtype))
    mask = [True, True, inputs["bias"] is not None]
    masks = [mask, [False, True, False], [True, False, False]]
    return [
        ("_router_logits_backward", {"grad": grad, "x": x, "weight": weight, "output_mask": m})
        for m in masks
    ]


class TestRouterLogits(DifferentiableOpTests):
    case = OpCase(
        name="router_logits",
        schema="router_logits(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
        make=make,
        reference=reference.router_logits,
        wrapper=lambda inputs: torchmoe.ops.router_logits(**inputs),
        situations=("plain", "single_expert", "one_token", "no_tokens", "many", "large"),
        variants=({"bias": True}, {"bias": False}),
        result_is_wide=True,
        differentiable=("x", "weight", "bias"),
        token_input="x",
        autocast=Autocast(torch.float32, ("x", "weight", "bias")),
        private=private,
        errors=(
            ErrorCase("x", altered("x", lambda x: x[0]), r"\[5\]"),
            ErrorCase("x", altered("x", lambda x: x[None]), r"\[1, 6, 5\]"),
            ErrorCase("x", altered("x", lambda x: x.long()), "Long"),
            ErrorCase("weight", altered("weight", lambda w: w[0]), r"\[5\]"),
            ErrorCase("weight", altered("weight", lambda w: w[:, 1:]), r"\[4, 4\]"),
            ErrorCase("x", altered("weight", lambda w: w.bfloat16()), "Float"),
            ErrorCase("bias", altered("bias", lambda b: b[1:]), r"\[3\]"),
            ErrorCase("bias", altered("bias", lambda b: b[None]), r"\[1, 4\]"),
            ErrorCase("bias", altered("bias", lambda b: b.double()), "Double"),
        ),
    )

    def test_no_width_leaves_the_bias(self) -> None:
        inputs = make(Situation("no_width", H=0), torch.float32, bias=True)
        (logits,) = self.case(inputs)
        assert torch.equal(logits, inputs["bias"].expand(6, 4))

    def test_a_16_bit_product_is_formed_in_float32(self) -> None:
        """Every term is below bfloat16's resolution at the sum's size."""
        x = torch.ones(1, 1024, dtype=torch.bfloat16)
        weight = torch.full((1, 1024), 2.0**-8, dtype=torch.bfloat16)
        weight[0, 0] = 64.0
        assert torchmoe.ops.router_logits(x, weight).item() == 64.0 + 1023 / 256

    def test_a_backward_inside_an_autocast_region_is_not_narrowed(self) -> None:
        inputs = make(SITUATIONS["plain"], torch.float32, **self.case.variants[0])
        x = inputs["x"].requires_grad_()
        (logits,) = self.case(inputs)
        grad = normal(*logits.shape, dtype=torch.float32)
        (expected,) = torch.autograd.grad(logits, x, grad, retain_graph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (actual,) = torch.autograd.grad(logits, x, grad)
        assert torch.equal(actual, expected)
