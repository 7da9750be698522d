"""mean_over_tokens: what losses and statistics of a router are composed from."""

from __future__ import annotations

import math

import torch

import reference
import torchmoe
from gradient_harness import DifferentiableOpTests
from op_case import ErrorCase, Inputs, OpCase, altered, run, wide_dtype
from situations import BLOCKS, SITUATIONS, Situation, normal


def make(s: Situation, dtype: torch.dtype, groups: tuple[int, ...], mask: bool) -> Inputs:
    token_mask = torch.rand(*groups, s.T) < 0.6
    if groups:
        token_mask[0] = False  # a group without a counted token
    return {
        "values": normal(*groups, s.T, s.E, dtype=dtype),
        "token_mask": token_mask if mask else None,
    }


def private(inputs: Inputs) -> list[tuple[str, Inputs]]:
    values = inputs["values"]
    grad = normal(*values.shape[:-2], values.size(-1), dtype=wide_dtype(values.dtype))
    rest = {"num_tokens": values.size(-2), "token_mask": inputs["token_mask"]}
    return [("_mean_over_tokens_backward", {"grad": grad, **rest})]


class TestMeanOverTokens(DifferentiableOpTests):
    case = OpCase(
        name="mean_over_tokens",
        schema="mean_over_tokens(Tensor values, *, Tensor? token_mask=None) -> Tensor",
        make=make,
        reference=reference.mean_over_tokens,
        wrapper=lambda inputs: torchmoe.ops.mean_over_tokens(**inputs),
        situations=("plain", "single_expert", "one_token", "no_tokens", "many", "large"),
        variants=(
            {"groups": (), "mask": True},
            {"groups": (), "mask": False},
            {"groups": (3,), "mask": False},
            {"groups": (2, 3), "mask": True},
        ),
        result_is_wide=True,
        differentiable=("values",),
        private=private,
        errors=(
            ErrorCase("values", altered("values", lambda v: v[0]), r"\[4\]"),
            ErrorCase("values", altered("values", lambda v: v.long()), "Long"),
            ErrorCase("token_mask", altered("token_mask", lambda m: m[1:]), r"\[5\]"),
            ErrorCase("token_mask", altered("token_mask", lambda m: m[:, None]), r"\[6, 1\]"),
            ErrorCase("token_mask", altered("token_mask", lambda m: m.long()), "Long"),
        ),
    )

    def test_masked_tokens_do_not_count(self, variant: Inputs) -> None:
        inputs = make(SITUATIONS["plain"], torch.float32, **(variant | {"mask": True}))
        counted = inputs["token_mask"]
        poisoned = inputs | {"values": inputs["values"].masked_fill(~counted[..., None], math.nan)}
        clean, dirty = (run(self.case, i, ("values",)) for i in (inputs, poisoned))
        assert torch.equal(dirty[0][0], clean[0][0])
        assert torch.equal(dirty[1][0], clean[1][0])
        assert bool((dirty[1][0][~counted] == 0).all())

    def test_no_columns(self) -> None:
        assert torchmoe.ops.mean_over_tokens(torch.zeros(5, 0)).shape == (0,)

    def test_a_sum_that_float32_could_not_hold(self) -> None:
        """2^25 + 1 tokens' worth: the odd one is lost where the sum is formed in float32."""
        values = torch.full((BLOCKS.T, 1), 2.0**24)
        values[0] = 1.0
        exact = (1.0 + (BLOCKS.T - 1) * 2.0**24) / BLOCKS.T
        assert torchmoe.ops.mean_over_tokens(values).item() == torch.tensor(exact).item()
