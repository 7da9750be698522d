"""cache_lookup: the nearest of the similar keys."""

from __future__ import annotations

import math

import pytest
import torch

import cache_reference
import torchmoe
from op_case import ErrorCase, Inputs, OpCase, altered
from op_harness import OpTests
from situations import INT64_MAX, INT64_MIN, Situation
from torchmoe.ops import CacheTable

pytestmark = pytest.mark.cpu_only


def make(s: Situation, dtype: torch.dtype, similarity: float = 0.75) -> Inputs:
    made = cache_reference.make_table(s, dtype)
    order = made["key_signatures"].t().sort(stable=True).indices
    return made | {"order": order, "similarity": similarity}


def wrapper(inputs: Inputs) -> torch.Tensor:
    table = CacheTable(inputs["keys"], inputs["key_signatures"])
    rest = inputs["order"], inputs["similarity"]
    return torchmoe.ops.cache_lookup(inputs["x"], inputs["signatures"], table, *rest)


class TestCacheLookup(OpTests):
    case = OpCase(
        name="cache_lookup",
        schema=(
            "cache_lookup(Tensor x, Tensor signatures, Tensor keys, Tensor key_signatures, "
            "Tensor order, float similarity) -> Tensor"
        ),
        make=make,
        reference=cache_reference.cache_lookup,
        wrapper=wrapper,
        situations=("plain", "one_token", "no_tokens", "large"),
        variants=({}, {"similarity": 0.25}, {"similarity": 1.0}),
        errors=(
            ErrorCase("x", altered("x", lambda x: x[0]), r"\[5\]"),
            ErrorCase("x", altered("x", lambda x: x.long()), "Long"),
            ErrorCase("signatures", altered("signatures", lambda s: s[1:]), r"\[5, 2\]"),
            ErrorCase("signatures", altered("signatures", lambda s: s[:, :0]), r"\[6, 0\]"),
            ErrorCase("signatures", altered("signatures", lambda s: s.int()), "Int"),
            ErrorCase("keys", altered("keys", lambda k: k[:, 1:]), r"\[8, 4\]"),
            ErrorCase("keys", altered("keys", lambda k: k.double()), "Double"),
            ErrorCase("key_signatures", altered("key_signatures", lambda s: s[1:]), r"\[7, 2\]"),
            ErrorCase("key_signatures", altered("key_signatures", lambda s: s.int()), "Int"),
            ErrorCase("order", altered("order", lambda o: o.t()), r"\[8, 2\]"),
            ErrorCase("order", altered("order", lambda o: o.int()), "Int"),
            ErrorCase("similarity", altered("similarity", lambda s: 0.0), "0", ValueError),
            ErrorCase("similarity", altered("similarity", lambda s: 1.01), "1.01", ValueError),
            ErrorCase("similarity", altered("similarity", lambda s: math.nan), "nan", ValueError),
        ),
        on_cpu_alone=True,
    )

    def test_hits_and_misses_are_both_tried(self) -> None:
        found = self.case(make(Situation("many", T=300, H=5, E=40), torch.float32))[0]
        assert (found < 0).sum() > 30
        assert (found >= 0).sum() > 30

    def test_the_nearest_is_found_then_the_lowest(self) -> None:
        keys = torch.tensor([[1.0, 0.02], [1.0, 0.0], [1.0, 0.01], [1.0, 0.01], [0.0, 1.0]])
        table = CacheTable(keys, torch.zeros(5, 1, dtype=torch.int64))
        order = torch.arange(5).unsqueeze(0)
        x = torch.tensor([[1.0, 0.0], [1.0, 0.011], [1.0, 0.5], [1.02, 0.0], [1.1, 0.0]])
        signatures = torch.zeros(5, 1, dtype=torch.int64)
        found = torchmoe.ops.cache_lookup(x, signatures, table, order, 0.95)
        assert found.tolist() == [1, 2, -1, 1, -1]

    def test_a_row_finds_itself_among_many(self) -> None:
        keys = torch.randn(5000, 33)
        planes = torch.randn(2, 16, 33)
        signatures = torchmoe.ops.cache_signatures(keys, planes)
        order = signatures.t().sort(stable=True).indices
        table = CacheTable(keys, signatures)
        for similarity in (0.5, 0.98, 1.0):
            found = torchmoe.ops.cache_lookup(keys, signatures, table, order, similarity)
            assert torch.equal(found, torch.arange(5000))

    def test_nothing_below_the_similarity(self) -> None:
        """Candidates are all; cosines and lengths on both sides of the bound, close to it."""
        bound = 0.98
        key = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        zero = torch.zeros(1, 1, dtype=torch.int64)
        for step in (1e-12, 1e-6, 1e-2):
            for inside in (True, False):
                c = bound + (step if inside else -step)
                cosine = [c, math.sqrt(1 - c * c)]
                for row in (cosine, [c, 0.0], [1 / c, 0.0]):
                    x = torch.tensor([row], dtype=torch.float64)
                    found = torchmoe.ops.cache_lookup(x, zero, CacheTable(key, zero), zero, bound)
                    assert found.item() == (0 if inside else -1), (row, step)

    @pytest.mark.parametrize("length", [1e-36, 1e-21, 1e-12, 1.0, 1e12, 1e18, 1e30])
    @pytest.mark.parametrize("kind", [torch.float32, torch.float64])
    def test_rows_of_any_length(self, length: float, kind: torch.dtype) -> None:
        """Squares of the longest and the shortest are no float32 numbers."""
        keys = (length * torch.randn(40, 50, dtype=torch.float64)).to(kind)
        near = (keys.double() * (1 + 0.1 * torch.randn(40, 50))).to(kind)
        zero = torch.zeros(40, 1, dtype=torch.int64)
        order = torch.arange(40).unsqueeze(0)
        for similarity in (0.98, 0.995, 1.0):
            for x in (keys, near):
                found = torchmoe.ops.cache_lookup(
                    x, zero, CacheTable(keys, zero), order, similarity
                )
                args = x, zero, keys, zero, order, similarity
                assert torch.equal(found, cache_reference.cache_lookup(*args))
                assert similarity == 1.0 or (found >= 0).any()

    def test_any_order_and_any_signature_is_safe(self) -> None:
        odd = torch.tensor([INT64_MIN, -1, 0, 3, 7, 8, INT64_MAX])
        for seed in range(50):
            torch.manual_seed(seed)
            inputs = make(Situation("plain"), torch.float32)
            for name in ("order", "signatures", "key_signatures"):
                drawn = odd[torch.randint(len(odd), inputs[name].shape)]
                inputs[name] = inputs[name].where(torch.rand(drawn.shape) < 0.5, drawn)
            (found,) = self.case(inputs)
            assert ((found >= -1) & (found < 8)).all()

    def test_no_entries(self) -> None:
        inputs = make(Situation("plain"), torch.float32)
        none = {"keys": inputs["keys"][:0], "key_signatures": inputs["key_signatures"][:0]}
        (found,) = self.case(inputs | none | {"order": inputs["order"][:, :0]})
        assert found.tolist() == [-1] * 6
