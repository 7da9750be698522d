"""select_experts: top-k with ties to the lower id."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
import torchmoe
from op_case import ErrorCase, Inputs, OpCase, altered
from op_harness import OpTests
from situations import Situation


def eighths(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Values whose sums are exact in every dtype; many are equal."""
    return (torch.randint(-16, 17, shape) / 8).to(dtype)


def make(
    s: Situation, dtype: torch.dtype, bias: bool, mask: bool, tie_break: bool = False
) -> Inputs:
    return {
        "scores": eighths(s.T, s.E, dtype=dtype),
        "top_k": s.K,
        "selection_bias": eighths(s.E, dtype=dtype) if bias else None,
        "token_mask": torch.rand(s.T) < 0.6 if mask else None,
        "tie_break": eighths(s.T, s.E, dtype=dtype) if tie_break else None,
    }


class TestSelectExperts(OpTests):
    case = OpCase(
        name="select_experts",
        schema=(
            "select_experts(Tensor scores, int top_k, *, Tensor? selection_bias=None, "
            "Tensor? token_mask=None, Tensor? tie_break=None) -> Tensor"
        ),
        make=make,
        reference=reference.select_experts,
        wrapper=lambda inputs: torchmoe.ops.select_experts(**inputs),
        situations=(
            "plain", "top1", "all_experts", "single_expert", "one_token", "no_tokens", "many",
            "large",
        ),
        variants=(
            {"bias": True, "mask": True, "tie_break": True},
            {"bias": True, "mask": True},
            {"bias": True, "mask": False},
            {"bias": False, "mask": True},
            {"bias": False, "mask": False},
            {"bias": False, "mask": False, "tie_break": True},
        ),
        errors=(
            ErrorCase("scores", altered("scores", lambda s: s[0]), r"\[4\]"),
            ErrorCase("scores", altered("scores", lambda s: s.long()), "Long"),
            ErrorCase("top_k", altered("top_k", lambda k: 0), "0", ValueError),
            ErrorCase("top_k", altered("top_k", lambda k: -1), "-1", ValueError),
            ErrorCase("top_k", altered("top_k", lambda k: 5), "5", ValueError),
            ErrorCase("selection_bias", altered("selection_bias", lambda b: b[1:]), r"\[3\]"),
            ErrorCase("selection_bias", altered("selection_bias", lambda b: b.long()), "Long"),
            ErrorCase("token_mask", altered("token_mask", lambda m: m[1:]), r"\[5\]"),
            ErrorCase("token_mask", altered("token_mask", lambda m: m.long()), "Long"),
            ErrorCase("tie_break", altered("tie_break", lambda t: t[1:]), r"\[5, 4\]"),
            ErrorCase("tie_break", altered("tie_break", lambda t: t.long()), "Long"),
        ),
    )  # fmt: skip

    def test_ties_go_to_the_lower_id(self) -> None:
        scores = torch.zeros(3, 300)
        scores[1, 200:] = 1.0
        scores[2, ::2] = -0.0
        expected = [list(range(300)), [*range(200, 300), *range(200)], list(range(300))]
        assert torchmoe.ops.select_experts(scores, 300).tolist() == expected

    def test_ties_go_to_the_larger_tie_break(self) -> None:
        """Sigmoids of these logits are 0 in float32, and a bias absorbs what is left of them."""
        logits = torch.tensor([[-100.0, -99.0, -98.0, -95.0]])
        for bias in (None, torch.zeros(4), torch.full((4,), 0.5)):
            chosen = torchmoe.ops.select_experts(
                logits.sigmoid(), 3, selection_bias=bias, tie_break=logits
            )
            assert chosen.tolist() == [[3, 2, 1]]
        bias = torch.tensor([0.5, 0.0, 0.0, 0.0])
        chosen = torchmoe.ops.select_experts(
            logits.sigmoid(), 4, selection_bias=bias, tie_break=logits
        )
        assert chosen.tolist() == [[0, 3, 2, 1]]

    def test_nan_decides_last(self) -> None:
        nan, inf = math.nan, math.inf
        scores = torch.tensor([[nan, nan, 0.0, 0.0, 0.0, nan]])
        tie_break = torch.tensor([[1.0, nan, nan, -inf, -inf, inf]])
        chosen = torchmoe.ops.select_experts(scores, 6, tie_break=tie_break)
        assert chosen.tolist() == [[3, 4, 2, 5, 0, 1]]

    def test_nan_ranks_after_minus_inf(self) -> None:
        nan, inf = math.nan, math.inf
        scores = torch.tensor([[nan, -inf, 1.0, inf, nan, -inf], [nan] * 6, [-inf] * 6])
        expected = [[3, 2, 1, 5, 0, 4], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
        assert torchmoe.ops.select_experts(scores, 6).tolist() == expected

    def test_bias_makes_nan_of_opposite_infinities(self) -> None:
        scores = torch.tensor([[math.inf, 0.0, 1.0]])
        bias = torch.tensor([-math.inf, 0.0, 0.0])
        assert torchmoe.ops.select_experts(scores, 3, selection_bias=bias).tolist() == [[2, 1, 0]]

    def test_a_masked_token_with_nan_is_masked(self) -> None:
        scores = torch.full((2, 3), math.nan)
        mask = torch.tensor([False, True])
        actual = torchmoe.ops.select_experts(scores, 2, token_mask=mask)
        assert actual.tolist() == [[-1, -1], [0, 1]]

    def test_result_carries_no_gradient(self) -> None:
        scores = torch.randn(3, 4, requires_grad=True)
        assert not torchmoe.ops.select_experts(scores, 2).requires_grad

    def test_wide_bias_is_not_rounded_to_the_scores(self) -> None:
        """A balancing bias moves in steps far below bfloat16's resolution."""
        scores = torch.ones(1, 3, dtype=torch.bfloat16)
        bias = torch.tensor([0.0, 1e-4, 2e-4])
        assert torchmoe.ops.select_experts(scores, 3, selection_bias=bias).tolist() == [[2, 1, 0]]

    @given(st.data())
    def test_any_scores(self, data: st.DataObject) -> None:
        num_tokens = data.draw(st.integers(0, 5))
        num_experts = data.draw(st.integers(1, 7))
        top_k = data.draw(st.integers(1, num_experts))
        number = st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 0.0, 1.0, -2.5, 1e-40])
        row = st.lists(number, min_size=num_experts, max_size=num_experts)
        matrix = st.lists(row, min_size=num_tokens, max_size=num_tokens)
        scores = torch.tensor(data.draw(matrix)).reshape(num_tokens, num_experts)
        tie_break = None
        if data.draw(st.booleans()):
            tie_break = torch.tensor(data.draw(matrix)).reshape(num_tokens, num_experts)
        actual = torchmoe.ops.select_experts(scores, top_k, tie_break=tie_break)
        assert torch.equal(actual, reference.select_experts(scores, top_k, tie_break=tie_break))
        everything = torchmoe.ops.select_experts(scores, num_experts, tie_break=tie_break)
        assert torch.equal(actual, everything[:, :top_k])
        assert all(sorted(ids) == list(range(num_experts)) for ids in everything.tolist())

    @pytest.mark.parametrize("top_k", [1, 4, 8, 64, 257])
    def test_many_experts(self, top_k: int) -> None:
        scores = torch.randint(0, 50, (20, 257)).float()
        actual = torchmoe.ops.select_experts(scores, top_k)
        assert torch.equal(actual, reference.select_experts(scores, top_k))
