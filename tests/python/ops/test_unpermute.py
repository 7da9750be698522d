"""unpermute: the weighted combine."""

from __future__ import annotations

import torch

import reference
import torchmoe
from gradient_harness import DifferentiableOpTests
from op_case import ErrorCase, Inputs, OpCase, altered, wide_dtype
from situations import PLAN, SITUATIONS, Situation, normal


def make(s: Situation, dtype: torch.dtype, wide: bool) -> Inputs:
    return {
        "rows": normal(s.T * s.K, s.H, dtype=dtype),
        "weights": normal(s.T, s.K, dtype=wide_dtype(dtype) if wide else dtype),
        **s.plan(),
    }


def plan_of(inputs: Inputs) -> torchmoe.ops.DispatchPlan:
    return torchmoe.ops.DispatchPlan(*(inputs[name] for name in PLAN))


def unrouted(inputs: Inputs) -> torch.Tensor:
    return inputs["slot_to_row"] >= inputs["expert_offsets"][-1]


def private(inputs: Inputs) -> list[tuple[str, Inputs]]:
    grad = normal(*inputs["weights"].shape[:1], inputs["rows"].size(1), dtype=inputs["rows"].dtype)
    return [("_unpermute_backward", {"grad": grad, **inputs})]


def poison(inputs: Inputs) -> Inputs:
    rows = inputs["rows"].clone()
    rows[inputs["expert_offsets"][-1] :] = torch.nan
    weights = inputs["weights"].masked_fill(unrouted(inputs), torch.nan)
    return inputs | {"rows": rows, "weights": weights}


class TestUnpermute(DifferentiableOpTests):
    case = OpCase(
        name="unpermute",
        schema=(
            "unpermute(Tensor rows, Tensor weights, Tensor expert_offsets, Tensor row_to_slot, "
            "Tensor slot_to_row) -> Tensor"
        ),
        make=make,
        reference=reference.unpermute,
        wrapper=lambda i: torchmoe.ops.unpermute(i["rows"], i["weights"], plan_of(i)),
        variants=({"wide": True}, {"wide": False}),
        differentiable=("rows", "weights"),
        private=private,
        poison=poison,
        errors=(
            ErrorCase("rows", altered("rows", lambda r: r[0]), r"\[5\]"),
            ErrorCase("rows", altered("rows", lambda r: r[1:]), r"\[11, 5\]"),
            ErrorCase("rows", altered("rows", lambda r: r.int()), "Int"),
            ErrorCase("weights", altered("weights", lambda w: w[1:]), r"\[5, 2\]"),
            ErrorCase("weights", altered("weights", lambda w: w[0]), r"\[2\]"),
            ErrorCase("weights", altered("weights", lambda w: w.half()), "Half"),
            ErrorCase("weights", altered("weights", lambda w: w.int()), "Int"),
            ErrorCase("slot_to_row", altered("slot_to_row", lambda s: s[0]), r"\[2\]"),
            ErrorCase("slot_to_row", altered("slot_to_row", lambda s: s.int()), "Int"),
            ErrorCase("row_to_slot", altered("row_to_slot", lambda r: r[1:]), r"\[11\]"),
            ErrorCase("row_to_slot", altered("row_to_slot", lambda r: r.int()), "Int"),
            ErrorCase("expert_offsets", altered("expert_offsets", lambda o: o[None]), r"\[1, 5\]"),
            ErrorCase("expert_offsets", altered("expert_offsets", lambda o: o[:0]), r"\[0\]"),
            ErrorCase("expert_offsets", altered("expert_offsets", lambda o: o.int()), "Int"),
        ),
    )

    def test_gradients_of_dropped_slots_are_exactly_zero(self) -> None:
        inputs = make(SITUATIONS["dropped"], torch.float32, wide=True)
        rows, weights = inputs["rows"].requires_grad_(), inputs["weights"].requires_grad_()
        (y,) = self.case(inputs)
        # A token without a routed slot gives nothing on, whatever arrives there.
        grad = torch.ones_like(y)
        grad[unrouted(inputs).all(1)] = torch.nan
        grad_rows, grad_weights = torch.autograd.grad(y, [rows, weights], grad)
        kept = int(inputs["expert_offsets"][-1])
        assert bool((grad_rows[kept:] == 0).all())
        assert bool((grad_weights[unrouted(inputs)] == 0).all())
        assert bool((grad_rows[:kept] != 0).all())
        assert bool((grad_weights[~unrouted(inputs)] != 0).all())

    def test_a_row_with_nan_reaches_its_token_only(self) -> None:
        inputs = make(SITUATIONS["plain"], torch.float32, wide=True)
        (clean,) = self.case(inputs)
        inputs["rows"][3] = torch.nan
        (y,) = self.case(inputs)
        token = int(inputs["row_to_slot"][3]) // 2
        others = torch.arange(6) != token
        assert bool(y[token].isnan().all())
        assert torch.equal(y[others], clean[others])

    def test_sixteen_bit_rows_are_summed_in_float32(self) -> None:
        plan = torchmoe.ops.dispatch_plan(torch.zeros(1, 511, dtype=torch.int64), 1)
        rows = torch.ones(511, 1, dtype=torch.bfloat16)
        # A bfloat16 sum of ones stops at 256; a float32 sum is 511, rounded once, to even.
        assert torchmoe.ops.unpermute(rows, torch.ones(1, 511), plan).item() == 512.0
