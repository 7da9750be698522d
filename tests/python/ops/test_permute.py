"""permute: tokens into expert order."""

from __future__ import annotations

import torch

import reference
import torchmoe
from gradient_harness import DifferentiableOpTests
from op_case import ErrorCase, Inputs, OpCase, altered
from situations import PLAN, SITUATIONS, Situation, normal


def make(s: Situation, dtype: torch.dtype) -> Inputs:
    return {"x": normal(s.T, s.H, dtype=dtype), **s.plan()}


def plan_of(inputs: Inputs) -> torchmoe.ops.DispatchPlan:
    return torchmoe.ops.DispatchPlan(*(inputs[name] for name in PLAN))


def private(inputs: Inputs) -> list[tuple[str, Inputs]]:
    grad = normal(inputs["row_to_slot"].numel(), inputs["x"].size(1), dtype=inputs["x"].dtype)
    plan = {name: inputs[name] for name in PLAN}
    return [("_permute_backward", {"grad": grad, **plan})]


def poison(inputs: Inputs) -> Inputs:
    unrouted = (inputs["slot_to_row"] >= inputs["expert_offsets"][-1]).all(1, keepdim=True)
    return inputs | {"x": inputs["x"].masked_fill(unrouted, torch.nan)}


class TestPermute(DifferentiableOpTests):
    case = OpCase(
        name="permute",
        schema=(
            "permute(Tensor x, Tensor expert_offsets, Tensor row_to_slot, Tensor slot_to_row) "
            "-> Tensor"
        ),
        make=make,
        reference=reference.permute,
        wrapper=lambda inputs: torchmoe.ops.permute(inputs["x"], plan_of(inputs)),
        differentiable=("x",),
        private=private,
        poison=poison,
        errors=(
            ErrorCase("x", altered("x", lambda x: x[0]), r"\[5\]"),
            ErrorCase("x", altered("x", lambda x: x.int()), "Int"),
            ErrorCase("slot_to_row", altered("x", lambda x: x[1:]), r"\[6, 2\]"),
            ErrorCase("slot_to_row", altered("slot_to_row", lambda s: s[0]), r"\[2\]"),
            ErrorCase("slot_to_row", altered("slot_to_row", lambda s: s.int()), "Int"),
            ErrorCase("row_to_slot", altered("row_to_slot", lambda r: r[1:]), r"\[11\]"),
            ErrorCase("row_to_slot", altered("row_to_slot", lambda r: r[None]), r"\[1, 12\]"),
            ErrorCase("row_to_slot", altered("row_to_slot", lambda r: r.int()), "Int"),
            ErrorCase("expert_offsets", altered("expert_offsets", lambda o: o[None]), r"\[1, 5\]"),
            ErrorCase("expert_offsets", altered("expert_offsets", lambda o: o[:0]), r"\[0\]"),
            ErrorCase("expert_offsets", altered("expert_offsets", lambda o: o.float()), "Float"),
        ),
    )

    def test_a_gradient_at_unrouted_rows_does_not_leak(self) -> None:
        inputs = make(SITUATIONS["dropped"], torch.float32)
        x = inputs["x"].requires_grad_()
        (rows,) = self.case(inputs)
        grad = torch.ones_like(rows)
        grad[inputs["expert_offsets"][-1] :] = torch.nan
        (grad_x,) = torch.autograd.grad(rows, x, grad)
        routed = (inputs["slot_to_row"] < inputs["expert_offsets"][-1]).sum(1, keepdim=True)
        assert torch.equal(grad_x, routed.float().expand_as(x))

    def test_rows_past_2_to_the_31_elements(self) -> None:
        plan = torchmoe.ops.DispatchPlan(
            torch.empty(9, dtype=torch.int64, device="meta"),
            torch.empty(2**20, dtype=torch.int64, device="meta"),
            torch.empty(2**19, 2, dtype=torch.int64, device="meta"),
        )
        x = torch.empty(2**19, 2**13, device="meta")
        assert torchmoe.ops.permute(x, plan).shape == (2**20, 2**13)

    def test_unpermute_of_permute_counts_the_slots(self) -> None:
        inputs = make(SITUATIONS["dropped"], torch.float64)
        plan = plan_of(inputs)
        ones = torch.ones(6, 2, dtype=torch.float64)
        y = torchmoe.ops.unpermute(torchmoe.ops.permute(inputs["x"], plan), ones, plan)
        kept = (plan.slot_to_row < plan.expert_offsets[-1]).sum(1, keepdim=True)
        assert torch.equal(y, inputs["x"] * kept)
