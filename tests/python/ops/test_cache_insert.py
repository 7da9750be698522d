"""cache_insert: which rows become entries, and which entries give way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cache_reference
import torchmoe
from op_case import ErrorCase, Inputs, OpCase, altered
from op_harness import OpTests
from situations import INT64_MIN, Situation
from torchmoe.ops import CacheTable

pytestmark = pytest.mark.cpu_only


def make(
    s: Situation, dtype: torch.dtype, eviction: str = "lru", similarity: float = 0.75
) -> Inputs:
    made = cache_reference.make_table(s, dtype)
    entries = len(made["keys"])
    return made | {
        "last_used": torch.randint(0, 5, (entries,)),
        "uses": torch.randint(1, 4, (entries,)),
        "similarity": similarity,
        "eviction": eviction,
    }


def wrapper(inputs: Inputs) -> torchmoe.ops.CacheInsertion:
    names = ("last_used", "uses", "similarity", "eviction")
    table = CacheTable(inputs["keys"], inputs["key_signatures"])
    rest = (inputs[name] for name in names)
    return torchmoe.ops.cache_insert(inputs["x"], inputs["signatures"], table, *rest)


class TestCacheInsert(OpTests):
    case = OpCase(
        name="cache_insert",
        schema=(
            "cache_insert(Tensor x, Tensor signatures, Tensor keys, Tensor key_signatures, "
            "Tensor last_used, Tensor uses, float similarity, str eviction) "
            "-> (Tensor row, Tensor last_used, Tensor uses)"
        ),
        make=make,
        reference=cache_reference.cache_insert,
        wrapper=wrapper,
        situations=("plain", "one_token", "no_tokens", "large"),
        variants=({}, {"eviction": "lfu"}, {"similarity": 1.0}),
        errors=(
            ErrorCase("x", altered("x", lambda x: x[0]), r"\[5\]"),
            ErrorCase("signatures", altered("signatures", lambda s: s[1:]), r"\[5, 2\]"),
            ErrorCase("keys", altered("keys", lambda k: k.double()), "Double"),
            ErrorCase("key_signatures", altered("key_signatures", lambda s: s[1:]), r"\[7, 2\]"),
            ErrorCase("last_used", altered("last_used", lambda t: t[1:]), r"\[7\]"),
            ErrorCase("last_used", altered("last_used", lambda t: t.int()), "Int"),
            ErrorCase("uses", altered("uses", lambda t: t[1:]), r"\[7\]"),
            ErrorCase("uses", altered("uses", lambda t: t.int()), "Int"),
            ErrorCase("similarity", altered("similarity", lambda s: -0.5), "-0.5", ValueError),
            ErrorCase("eviction", altered("eviction", lambda e: "fifo"), '"fifo"', ValueError),
        ),
        on_cpu_alone=True,
    )

    def test_the_wrapper_names_the_parts(self) -> None:
        assert isinstance(wrapper(make(Situation("plain"), torch.float32))._asdict(), dict)

    @pytest.mark.parametrize("eviction", torchmoe.ops.EVICTIONS)
    @given(data=st.data())
    def test_any_stream(self, eviction: str, data: st.DataObject) -> None:
        """Few directions, so that rows hit, evict one another and come back."""
        size = data.draw(st.integers(0, 4))
        numbers = data.draw(st.lists(st.integers(-1, 7), max_size=20))
        directions = torch.eye(8)
        x = directions[[max(n, 0) for n in numbers]].view(-1, 8)
        signatures = torch.tensor(numbers, dtype=torch.int64).view(-1, 1)
        held = data.draw(st.lists(st.integers(0, 7), min_size=size, max_size=size, unique=True))
        free = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
        of_held = [-1 if f else h for h, f in zip(held, free, strict=True)]
        inputs = {
            "x": x,
            "signatures": signatures,
            "keys": directions[held].view(-1, 8),
            "key_signatures": torch.tensor(of_held, dtype=torch.int64).view(-1, 1),
            "last_used": torch.arange(size),
            "uses": torch.ones(size, dtype=torch.int64),
            "similarity": 0.98,
            "eviction": eviction,
        }
        for actual, expected in zip(self.case(inputs), self.case.expect(inputs), strict=True):
            assert torch.equal(actual, expected)

    def test_a_row_that_was_evicted_comes_back(self) -> None:
        """Its entry is still listed under its old signature by then."""
        x = torch.eye(3)[[0, 1, 0, 2, 1]]
        signatures = torch.tensor([0, 1, 0, 2, 1]).unsqueeze(1)
        table = CacheTable(torch.zeros(2, 3), torch.full((2, 1), -1))
        nothing = torch.zeros(2, dtype=torch.int64)
        rest = 0.98, "lru"
        done = torchmoe.ops.cache_insert(x, signatures, table, nothing, nothing, *rest)
        assert done.row.tolist() == [4, 3]
        assert done.last_used.tolist() == [4, 3]
        assert done.uses.tolist() == [1, 1]
        kept = torchmoe.ops.cache_insert(x, signatures, table, nothing, nothing, 0.98, "lfu")
        assert kept.row.tolist() == [0, 4]
        assert kept.uses.tolist() == [2, 1]

    def test_any_numbers_are_safe(self) -> None:
        inputs = make(Situation("plain"), torch.float32)
        wild = torch.tensor([INT64_MIN, -3, 0, 7, 7, 2, 0, 1])
        row, _, _ = self.case(inputs | {"last_used": wild, "uses": wild.flip(0)})
        assert ((row >= -1) & (row < 6)).all()
