"""sum_by_expert: what the rows of each expert add up to."""

from __future__ import annotations

import pytest
import torch

import reference
import torchmoe
from gradient_harness import DifferentiableOpTests
from op_case import ErrorCase, Inputs, OpCase, altered
from situations import SITUATIONS, Situation, normal


def make(s: Situation, dtype: torch.dtype) -> Inputs:
    rows = normal(s.T * s.K, s.H, dtype=dtype)
    return {"rows": rows, "expert_offsets": s.plan()["expert_offsets"]}


def private(inputs: Inputs) -> list[tuple[str, Inputs]]:
    offsets, rows = inputs["expert_offsets"], inputs["rows"]
    grad = normal(len(offsets) - 1, rows.size(1), dtype=rows.dtype)
    arguments = {"grad": grad, "expert_offsets": offsets, "num_rows": len(rows)}
    return [("_sum_by_expert_backward", arguments)]


def poison(inputs: Inputs) -> Inputs:
    rows = inputs["rows"].clone()
    rows[inputs["expert_offsets"][-1] :] = torch.nan
    return inputs | {"rows": rows}


class TestSumByExpert(DifferentiableOpTests):
    case = OpCase(
        name="sum_by_expert",
        schema="sum_by_expert(Tensor rows, Tensor expert_offsets) -> Tensor",
        make=make,
        reference=reference.sum_by_expert,
        wrapper=lambda inputs: torchmoe.ops.sum_by_expert(**inputs),
        differentiable=("rows",),
        private=private,
        poison=poison,
        errors=(
            ErrorCase("rows", altered("rows", lambda r: r[0]), r"\[5\]"),
            ErrorCase("rows", altered("rows", lambda r: r.int()), "Int"),
            ErrorCase("expert_offsets", altered("expert_offsets", lambda o: o[None]), r"\[1, 5\]"),
            ErrorCase("expert_offsets", altered("expert_offsets", lambda o: o[:0]), r"\[0\]"),
            ErrorCase("expert_offsets", altered("expert_offsets", lambda o: o.int()), "Int"),
        ),
    )

    def test_an_expert_without_rows_has_0(self) -> None:
        inputs = make(SITUATIONS["empty_expert"], torch.float32)
        idle = inputs["expert_offsets"].diff() == 0
        (sums,) = self.case(inputs)
        assert idle.any()
        assert not sums[idle].any()

    @pytest.mark.parametrize("offsets", [[0, 2, 1, 3], [-4, 2, 2, 99], [1, 1, 2, 3], [5, 0, 0, 0]])
    def test_whatever_the_offsets_the_gradient_is_the_values(self, offsets: list[int]) -> None:
        rows = normal(4, 2, dtype=torch.float64).requires_grad_()
        given = torch.tensor(offsets)
        sums = torchmoe.ops.sum_by_expert(rows, given)
        weights = normal(3, 2, dtype=torch.float64)
        (grad,) = torch.autograd.grad((weights * sums).sum(), rows)
        # Linear: the value is what the gradient gives.
        torch.testing.assert_close((grad * rows).sum(), (weights * sums).sum())

    def test_sums_over_several_blocks_in_row_order(self) -> None:
        rows = torch.randn(5000, 700).bfloat16()
        offsets = torch.tensor([0, 4000, 4000, 4999])
        sums = torchmoe.ops.sum_by_expert(rows, offsets)
        expected = torch.stack(
            [rows[a:b].double().sum(0) for a, b in ((0, 4000), (4000, 4000), (4000, 4999))]
        )
        assert sums.dtype == torch.bfloat16
        torch.testing.assert_close(sums.double(), expected, atol=1e-3, rtol=2**-8)
