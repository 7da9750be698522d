"""limit_capacity: who keeps its place when an expert is full."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
import torchmoe
from op_case import ErrorCase, Inputs, OpCase, altered
from op_harness import OpTests
from situations import INT64_MAX, INT64_MIN, Situation, normal


def make(s: Situation, dtype: torch.dtype, order: str, priority: bool) -> Inputs:
    capacity = torch.tensor([2, 0, 3, -1, 1, 20, 7, 40, 11])[: s.E]
    return {
        "indices": s.indices(),
        "capacity": capacity,
        "order": order,
        "priority": normal(s.T, s.K, dtype=dtype) if priority else None,
        "overflow": "drop",
    }


class TestLimitCapacity(OpTests):
    case = OpCase(
        name="limit_capacity",
        schema=(
            'limit_capacity(Tensor indices, Tensor capacity, *, str order="choice", '
            'Tensor? priority=None, str overflow="drop") -> Tensor'
        ),
        make=make,
        reference=reference.limit_capacity,
        wrapper=lambda inputs: torchmoe.ops.limit_capacity(**inputs),
        variants=(
            {"order": "choice", "priority": True},
            {"order": "choice", "priority": False},
            {"order": "token", "priority": True},
            {"order": "token", "priority": False},
        ),
        errors=(
            ErrorCase("indices", altered("indices", lambda i: i[0]), r"\[2\]"),
            ErrorCase("indices", altered("indices", lambda i: i.int()), "Int"),
            ErrorCase("capacity", altered("capacity", lambda c: c[0]), r"\[\]"),
            ErrorCase("capacity", altered("capacity", lambda c: c[None]), r"\[1, 4\]"),
            ErrorCase("capacity", altered("capacity", lambda c: c.float()), "Float"),
            ErrorCase("priority", altered("priority", lambda p: p[1:]), r"\[5, 2\]"),
            ErrorCase("priority", altered("priority", lambda p: p.long()), "Long"),
            ErrorCase("order", altered("order", lambda o: "first"), '"first"', ValueError),
            ErrorCase("overflow", altered("overflow", lambda o: "spill"), '"spill"', ValueError),
        ),
    )

    def test_an_int_is_the_same_for_every_expert(self) -> None:
        indices = Situation("many", T=40).indices()
        expected = torchmoe.ops.limit_capacity(indices, torch.full((4,), 5))
        assert torch.equal(torchmoe.ops.limit_capacity(indices, 5, num_experts=4), expected)

    def test_int_capacity_errors(self) -> None:
        indices = Situation("any").indices()
        with pytest.raises(ValueError, match=r"^limit_capacity: num_experts must .*, got None"):
            torchmoe.ops.limit_capacity(indices, 5)
        with pytest.raises(ValueError, match=r"^limit_capacity: capacity must be .*, got -1"):
            torchmoe.ops.limit_capacity(indices, -1, num_experts=4)
        with pytest.raises(RuntimeError, match=r"^limit_capacity: capacity must .*, got .*\[4\]"):
            torchmoe.ops.limit_capacity(indices, torch.full((4,), 5), num_experts=3)

    def test_nan_priority_ranks_last(self) -> None:
        indices = torch.zeros(4, 1, dtype=torch.int64)
        priority = torch.tensor([[math.nan], [-math.inf], [0.0], [math.nan]])
        kept = [
            torchmoe.ops.limit_capacity(indices, torch.tensor([c]), priority=priority)
            for c in range(5)
        ]
        names = [(k[:, 0] == 0).nonzero()[:, 0].tolist() for k in kept]
        assert names == [[], [2], [1, 2], [0, 1, 2], [0, 1, 2, 3]]

    def test_only_token_order_is_causal(self) -> None:
        """Under "token" nothing after a token changes its fate; under "choice" it may."""
        indices = Situation("many", T=30).indices()
        capacity = torch.full((4,), 6)
        whole = torchmoe.ops.limit_capacity(indices, capacity, order="token")
        prefixes_agree = [
            torch.equal(
                torchmoe.ops.limit_capacity(indices[:n], capacity, order="token"), whole[:n]
            )
            for n in range(31)
        ]
        assert all(prefixes_agree)
        whole = torchmoe.ops.limit_capacity(indices, capacity, order="choice")
        prefix = torchmoe.ops.limit_capacity(indices[:15], capacity, order="choice")
        assert not torch.equal(prefix, whole[:15])

    @given(st.data())
    def test_any_indices(self, data: st.DataObject) -> None:
        num_tokens, top_k = data.draw(st.integers(0, 8)), data.draw(st.integers(1, 3))
        num_experts = data.draw(st.integers(1, 4))

        def matrix(element: st.SearchStrategy[Any], dtype: torch.dtype) -> torch.Tensor:
            count = num_tokens * top_k
            values = data.draw(st.lists(element, min_size=count, max_size=count))
            return torch.tensor(values, dtype=dtype).reshape(num_tokens, top_k)

        odd = st.sampled_from([-1, num_experts, num_experts + 7, INT64_MIN, INT64_MAX])
        indices = matrix(st.integers(0, num_experts - 1) | odd, torch.int64)
        capacity = torch.tensor(
            data.draw(
                st.lists(
                    st.integers(-2, 6) | st.sampled_from([INT64_MIN, INT64_MAX]),
                    min_size=num_experts,
                    max_size=num_experts,
                )
            )
        )
        order = data.draw(st.sampled_from(["choice", "token"]))
        number = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 2.0])
        priority = matrix(number, torch.float32) if data.draw(st.booleans()) else None
        kept = torchmoe.ops.limit_capacity(indices, capacity, order=order, priority=priority)

        expected = reference.limit_capacity(indices, capacity, order=order, priority=priority)
        assert torch.equal(kept, expected)
        routed = (indices >= 0) & (indices < num_experts)
        assert bool(((kept == indices) | (kept == -1)).all())
        assert bool((kept[~routed] == -1).all())
        for expert in range(num_experts):
            asked, places = int((indices == expert).sum()), max(int(capacity[expert]), 0)
            assert int((kept == expert).sum()) == min(asked, places)

    def test_equal_priorities_keep_their_order(self) -> None:
        """More slots than the 16 that an unstable sort may order by insertion."""
        indices = torch.zeros(100, 1, dtype=torch.int64)
        priority = torch.arange(100).remainder(3).float().unsqueeze(1)
        capacity = torch.tensor([50])
        kept = torchmoe.ops.limit_capacity(indices, capacity, priority=priority)
        assert torch.equal(kept, reference.limit_capacity(indices, capacity, priority=priority))
