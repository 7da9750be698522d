"""dispatch_plan: the stable sort of the slots by expert."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
import torchmoe
from op_case import ErrorCase, Inputs, OpCase, altered
from op_harness import OpTests
from situations import INT64_MAX, INT64_MIN, Situation


def make(s: Situation, dtype: torch.dtype) -> Inputs:
    del dtype
    return {"indices": s.indices(), "num_experts": s.E}


class TestDispatchPlan(OpTests):
    case = OpCase(
        name="dispatch_plan",
        schema=(
            "dispatch_plan(Tensor indices, SymInt num_experts) "
            "-> (Tensor expert_offsets, Tensor row_to_slot, Tensor slot_to_row)"
        ),
        make=make,
        reference=reference.dispatch_plan,
        wrapper=lambda inputs: torchmoe.ops.dispatch_plan(**inputs),
        dtypes=(torch.int64,),
        errors=(
            ErrorCase("indices", altered("indices", lambda i: i[0]), r"\[2\]"),
            ErrorCase("indices", altered("indices", lambda i: i[None]), r"\[1, 6, 2\]"),
            ErrorCase("indices", altered("indices", lambda i: i.int()), "Int"),
            ErrorCase("indices", altered("indices", lambda i: i.float()), "Float"),
            ErrorCase("num_experts", altered("num_experts", lambda e: -1), "-1", ValueError),
        ),
    )

    def test_the_wrapper_names_the_parts(self) -> None:
        plan = torchmoe.ops.dispatch_plan(torch.tensor([[1, 0]]), 3)
        assert isinstance(plan, torchmoe.ops.DispatchPlan)
        assert plan.expert_offsets.tolist() == [0, 1, 2, 2]
        assert plan.row_to_slot.tolist() == [1, 0]
        assert plan.slot_to_row.tolist() == [[1, 0]]

    def test_no_experts(self) -> None:
        plan = torchmoe.ops.dispatch_plan(torch.tensor([[0, -1], [3, 2]]), 0)
        assert plan.expert_offsets.tolist() == [0]
        assert plan.row_to_slot.tolist() == [0, 1, 2, 3]

    @pytest.mark.parametrize("num_experts", [1, 7, 64, 1000])
    def test_many_slots(self, num_experts: int) -> None:
        """Enough slots for several parallel blocks, whose counts must join in order."""
        indices = torch.randint(-1, num_experts + 1, (20_000, 2))
        plan = torchmoe.ops.dispatch_plan(indices, num_experts)
        ids = indices.flatten()
        ids = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids)
        assert torch.equal(plan.row_to_slot, ids.argsort(stable=True))
        counts = torch.bincount(ids, minlength=num_experts + 1)[:num_experts]
        assert torch.equal(plan.expert_offsets.diff(), counts)

    @given(st.data())
    def test_any_indices(self, data: st.DataObject) -> None:
        num_tokens, top_k = data.draw(st.integers(0, 8)), data.draw(st.integers(1, 3))
        num_experts = data.draw(st.integers(1, 5))
        odd = st.sampled_from([-1, num_experts, num_experts + 7, INT64_MIN, INT64_MAX])
        element = st.integers(0, num_experts - 1) | odd
        slots = num_tokens * top_k
        ids = data.draw(st.lists(element, min_size=slots, max_size=slots))
        indices = torch.tensor(ids, dtype=torch.int64).reshape(num_tokens, top_k)
        plan = torchmoe.ops.dispatch_plan(indices, num_experts)

        rows = plan.row_to_slot.tolist()
        assert sorted(rows) == list(range(slots))
        assert plan.slot_to_row.flatten()[plan.row_to_slot].tolist() == list(range(slots))
        offsets = plan.expert_offsets.tolist()
        counts = [ids.count(expert) for expert in range(num_experts)]
        assert offsets == [sum(counts[:expert]) for expert in range(num_experts + 1)]
        bounds = [*offsets, slots]
        for expert, (begin, end) in enumerate(pairwise(bounds)):
            group = rows[begin:end]
            assert group == sorted(group)
            inside = range(num_experts)
            if expert < num_experts:
                assert all(ids[slot] == expert for slot in group)
            else:
                assert all(ids[slot] not in inside for slot in group)
