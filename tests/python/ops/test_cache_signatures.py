"""cache_signatures: the sides of random hyperplanes."""

from __future__ import annotations

import math

import pytest
import torch

import cache_reference
import torchmoe
from cache_reference import BITS, TABLES, eighths
from op_case import ErrorCase, Inputs, OpCase, altered
from op_harness import OpTests
from situations import Situation

pytestmark = pytest.mark.cpu_only


def make(s: Situation, dtype: torch.dtype, mask: bool) -> Inputs:
    x = eighths(s.T, s.H, dtype=dtype)
    x[::4] = 0
    return {
        "x": x,
        "planes": eighths(TABLES, BITS, s.H, dtype=dtype),
        "row_mask": torch.rand(s.T) < 0.7 if mask else None,
    }


class TestCacheSignatures(OpTests):
    case = OpCase(
        name="cache_signatures",
        schema="cache_signatures(Tensor x, Tensor planes, Tensor? row_mask=None) -> Tensor",
        make=make,
        reference=cache_reference.cache_signatures,
        wrapper=lambda i: torchmoe.ops.cache_signatures(
            i["x"], i["planes"], row_mask=i["row_mask"]
        ),
        situations=("plain", "one_token", "no_tokens", "large"),
        variants=({"mask": True}, {"mask": False}),
        errors=(
            ErrorCase("x", altered("x", lambda x: x[0]), r"\[5\]"),
            ErrorCase("x", altered("x", lambda x: x.long()), "Long"),
            ErrorCase("planes", altered("planes", lambda p: p[0]), r"\[3, 5\]"),
            ErrorCase("planes", altered("planes", lambda p: p[..., 1:]), r"\[2, 3, 4\]"),
            ErrorCase("planes", altered("planes", lambda p: p[:, :0]), r"\[2, 0, 5\]"),
            ErrorCase("planes", altered("planes", lambda p: p.repeat(1, 21, 1)), r"\[2, 63, 5\]"),
            ErrorCase("planes", altered("planes", lambda p: p.long()), "Long"),
            ErrorCase("row_mask", altered("row_mask", lambda m: m[1:]), r"\[5\]"),
            ErrorCase("row_mask", altered("row_mask", lambda m: m.long()), "Long"),
        ),
        on_cpu_alone=True,
    )

    def test_rows_without_a_direction(self) -> None:
        inf, nan = math.inf, math.nan
        x = torch.tensor([[0.0, 0.0], [nan, 1.0], [inf, 1.0], [1e-30, 0.0], [3.0, 4.0]])
        planes = torch.tensor([[[1.0, 0.0], [0.0, -1.0]]])
        assert torchmoe.ops.cache_signatures(x, planes).tolist() == [[-1]] * 3 + [[3], [1]]
        tiny = torch.tensor([[1e-76, 0.0], [1e76, 0.0], [1e-74, 0.0]], dtype=torch.float64)
        assert torchmoe.ops.cache_signatures(tiny, planes).tolist() == [[-1], [-1], [3]]

    def test_length_does_not_matter(self) -> None:
        x, planes = torch.randn(50, 7), torch.randn(3, 62, 7)
        signatures = torchmoe.ops.cache_signatures(x, planes)
        assert torch.equal(torchmoe.ops.cache_signatures(8 * x, planes), signatures)
        assert not torch.equal(torchmoe.ops.cache_signatures(-x, planes), signatures)

    def test_a_bit_is_the_same_with_one_minus_the_angle_over_pi(self) -> None:
        angle, bits = 0.4, 62
        x = torch.tensor([[1.0, 0.0, 0.0], [math.cos(angle), math.sin(angle), 0.0]])
        planes = torch.randn(500, bits, 3)
        a, b = torchmoe.ops.cache_signatures(x, planes)
        different = sum((int(i) ^ int(j)).bit_count() for i, j in zip(a, b, strict=True))
        n, p = 500 * bits, angle / math.pi
        assert abs(different / n - p) < 5 * math.sqrt(p * (1 - p) / n)
