"""grouped_linear: each expert's linear layer on its own rows."""

from __future__ import annotations

import torch

import reference
import torchmoe
from gradient_harness import DifferentiableOpTests
from op_case import Autocast, ErrorCase, Inputs, OpCase, altered
from situations import SITUATIONS, Situation, normal


def make(s: Situation, dtype: torch.dtype, bias: bool) -> Inputs:
    return {
        "rows": normal(s.T * s.K, s.H, dtype=dtype),
        "weight": normal(s.E, s.I, s.H, dtype=dtype),
        "bias": normal(s.E, s.I, dtype=dtype) if bias else None,
        "expert_offsets": s.plan()["expert_offsets"],
    }


def private(inputs: Inputs) -> list[tuple[str, Inputs]]:
    grad = normal(len(inputs["rows"]), inputs["weight"].size(1), dtype=inputs["rows"].dtype)
    rest = {name: inputs[name] for name in ("rows", "weight", "expert_offsets")}
    mask = [True, True, inputs["bias"] is not None]
    masks = [mask, [False, True, False], [True, False, False]]
    return [("_grouped_linear_backward", {"grad": grad, **rest, "output_mask": m}) for m in masks]


def poison(inputs: Inputs) -> Inputs:
    rows = inputs["rows"].clone()
    rows[inputs["expert_offsets"][-1] :] = torch.nan
    return inputs | {"rows": rows}


class TestGroupedLinear(DifferentiableOpTests):
    case = OpCase(
        name="grouped_linear",
        schema=(
            "grouped_linear(Tensor rows, Tensor weight, Tensor? bias, Tensor expert_offsets) "
            "-> Tensor"
        ),
        make=make,
        reference=reference.grouped_linear,
        wrapper=lambda inputs: torchmoe.ops.grouped_linear(**inputs),
        variants=({"bias": True}, {"bias": False}),
        differentiable=("rows", "weight", "bias"),
        private=private,
        poison=poison,
        autocast=Autocast(torch.bfloat16, ("rows", "weight", "bias")),
        errors=(
            ErrorCase("rows", altered("rows", lambda r: r[0]), r"\[5\]"),
            ErrorCase("rows", altered("rows", lambda r: r.int()), "Int"),
            ErrorCase("weight", altered("weight", lambda w: w[0]), r"\[3, 5\]"),
            ErrorCase("weight", altered("weight", lambda w: w[..., 1:]), r"\[4, 3, 4\]"),
            ErrorCase("weight", altered("weight", lambda w: w.half()), "Half"),
            ErrorCase("bias", altered("bias", lambda b: b[:, 1:]), r"\[4, 2\]"),
            ErrorCase("bias", altered("bias", lambda b: b[0]), r"\[3\]"),
            ErrorCase("bias", altered("bias", lambda b: b.double()), "Double"),
            ErrorCase("expert_offsets", altered("expert_offsets", lambda o: o[1:]), r"\[4\]"),
            ErrorCase("expert_offsets", altered("expert_offsets", lambda o: o[None]), r"\[1, 5\]"),
            ErrorCase("expert_offsets", altered("expert_offsets", lambda o: o.int()), "Int"),
        ),
    )

    def test_an_idle_expert_has_a_dense_gradient_of_zeros(self) -> None:
        inputs = make(SITUATIONS["empty_expert"], torch.float32, bias=True)
        weight, bias = inputs["weight"].requires_grad_(), inputs["bias"].requires_grad_()
        self.case(inputs)[0].sum().backward()
        for parameter in (weight, bias):
            assert parameter.grad is not None
            idle = (parameter.grad == 0).flatten(1).all(1)
            assert idle.tolist() == [False, True, False, False]

    def test_a_gradient_at_unrouted_rows_does_not_leak(self) -> None:
        inputs = make(SITUATIONS["dropped"], torch.float32, bias=True)
        values = [inputs[n].requires_grad_() for n in ("rows", "weight", "bias")]
        (y,) = self.case(inputs)
        clean = torch.ones_like(y)
        spoiled = clean.clone()
        spoiled[inputs["expert_offsets"][-1] :] = torch.nan
        expected = torch.autograd.grad(y, values, clean, retain_graph=True)
        actual = torch.autograd.grad(y, values, spoiled)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
        assert bool((actual[0][inputs["expert_offsets"][-1] :] == 0).all())

    def test_no_width_leaves_the_bias(self) -> None:
        situation = Situation("no_width", H=0)
        inputs = make(situation, torch.float32, bias=True)
        (y,) = self.case(inputs)
        assert torch.equal(y, reference.grouped_linear(**inputs).float())
