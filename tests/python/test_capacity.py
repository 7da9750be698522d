"""expert_capacity is exact, for integers, symbolic integers and tensors."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from math import ceil

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given
from torch._dynamo.testing import CompileCounterWithBackend

from torchmoe import expert_capacity
from torchmoe.capacity import capacity_ratio
from torchmoe.nn import Capacity


@pytest.mark.parametrize(
    ("factor", "expected"), [(0.5, 3), (0.9, 6), (1.0, 6), (1.1, 7), (1.25, 8)]
)
def test_the_table_of_the_fixture(factor: float, expected: int) -> None:
    assert expert_capacity(12, 4, 2, factor) == expected


@pytest.mark.parametrize("factor", [1.1, Fraction(11, 10), Decimal("1.1"), np.float32(1.1)])
def test_a_factor_is_the_fraction_that_was_meant(factor: float) -> None:
    assert ceil(1.1 * 2 * 200 / 4) == 111  # what rounding does
    assert expert_capacity(200, 4, 2, factor) == 110
    assert torch.equal(expert_capacity(torch.tensor(200), 4, 2, factor), torch.tensor(110))


def test_a_third_written_as_a_float_is_a_third() -> None:
    assert capacity_ratio(4 / 3) == capacity_ratio(np.float32(4 / 3)) == (4, 3)
    assert expert_capacity(3 * 10**9, 8, 2, 4 / 3) == 10**9
    assert expert_capacity(torch.tensor(3 * 10**9), 8, 2, 4 / 3).item() == 10**9


@given(st.floats(0, 1e6) | st.fractions(0, 10**6) | st.decimals(0, 10**6))
def test_a_factor_is_the_nearest_fraction_of_a_million_parts(
    factor: float | Fraction | Decimal,
) -> None:
    exact = Fraction(factor)
    near = Fraction(*capacity_ratio(factor))
    assert near.denominator <= 10**6
    for parts in (1, 10, 997, 999_983, 10**6):
        assert abs(near - exact) <= abs(Fraction(round(exact * parts), parts) - exact)


def test_bounds() -> None:
    assert expert_capacity(0, 4, 2, 1.0, 5) == 0
    assert expert_capacity(3, 4, 1, 0.01, 2) == 2
    assert expert_capacity(3, 4, 1, 0.01, 5) == 3
    assert expert_capacity(3, 4, 1, 1e30) == 3
    assert expert_capacity(100, 4, 1, 0) == 0
    assert expert_capacity(100, 4, 1, 0.0, 7) == 7
    tokens = torch.tensor([0, 3, 100])
    assert expert_capacity(tokens, 4, 1, 0.01, 2).tolist() == [0, 2, 2]
    assert expert_capacity(tokens, 4, 1, 1e30).tolist() == [0, 3, 100]
    assert expert_capacity(torch.tensor(3, dtype=torch.int32), 4, 1, 1.0).dtype == torch.int64


@given(
    st.integers(0, 10**6),
    st.integers(1, 512),
    st.integers(1, 8),
    st.decimals(0, 100, places=6),
    st.integers(0, 50),
)
def test_equals_the_fraction(
    num_tokens: int, num_experts: int, top_k: int, factor: Decimal, minimum: int
) -> None:
    top_k = min(top_k, num_experts)
    slots = ceil(Fraction(factor) * top_k * num_tokens / num_experts)
    expected = min(max(slots, minimum), num_tokens)
    arguments = num_experts, top_k, factor, minimum
    assert expert_capacity(num_tokens, *arguments) == expected
    assert expert_capacity(torch.tensor(num_tokens), *arguments).item() == expected


def test_compiles_once_for_all_token_counts() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        capacity = expert_capacity(x.shape[0], 4, 2, 1.1, 3)
        counted = expert_capacity((x > 0).sum(), 4, 2, 1.1, 3)
        return x.new_full((4,), capacity), counted

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (200, 5, 77):
        x = torch.randn(num_tokens)
        for got, expected in zip(compiled(x), f(x), strict=True):
            assert torch.equal(got, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 4, 2, 1.0), ValueError, r"expert_capacity: num_tokens must be >= 0, got -1"),
        (
            (8, 0, 1, 1.0),
            ValueError,
            r"expert_capacity: num_experts must be in \[1, 2147483648\], got 0",
        ),
        ((8, 4, 0, 1.0), ValueError, r"expert_capacity: top_k must be in \[1, 4\], got 0"),
        ((8, 4, 5, 1.0), ValueError, r"expert_capacity: top_k must be in \[1, 4\], got 5"),
        (
            (8, 4, 2, -0.5),
            ValueError,
            r"expert_capacity: capacity_factor must be a finite number >= 0, got -0.5",
        ),
        ((8, 4, 2, float("nan")), ValueError, r"expert_capacity: capacity_factor .*, got nan"),
        ((8, 4, 2, float("inf")), ValueError, r"expert_capacity: capacity_factor .*, got inf"),
        ((8, 4, 2, "1.1"), TypeError, r"expert_capacity: capacity_factor .* number, got '1.1'"),
        ((8, 4, 2, True), TypeError, r"expert_capacity: capacity_factor .* number, got True"),
        ((8, 4, 2, 1.0, -1), ValueError, r"expert_capacity: min_capacity must be >= 0, got -1"),
        (
            (torch.tensor(8.0), 4, 2, 1.0),
            ValueError,
            r"expert_capacity: num_tokens must be an int or an int64 tensor, got .*float32",
        ),
    ],
)
def test_errors(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        expert_capacity(*arguments)


@given(
    num_tokens=st.integers(0, 10**10),
    num_experts=st.integers(8, 512),
    top_k=st.integers(1, 8),
    factor=st.floats(0, 600) | st.fractions(0, 4),
    rounding=st.sampled_from(["up", "down"]),
)
@example(9 * 10**12 // 512, 512, 1, Fraction(999_983, 10**6), "up")
def test_a_tensor_gives_what_an_int_gives(
    num_tokens: int, num_experts: int, top_k: int, factor: float | Fraction, rounding: str
) -> None:
    arguments = num_experts, top_k, factor, 0, rounding
    expected = expert_capacity(num_tokens, *arguments)
    assert expert_capacity(torch.tensor(num_tokens), *arguments) == expected


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1 / 3, 4 / 3])
def test_fractions_are_exact_when_compiled(factor: float) -> None:
    """Generated code computes in int64."""
    capacity = Capacity(factor)

    def capacities(x: torch.Tensor) -> torch.Tensor:
        return torch.full((1,), capacity.slots(x.shape[0], 8, 2, training=True))

    compiled = torch.compile(capacities, fullgraph=True, dynamic=True)
    for num_tokens in (4096, 65537, 3):
        assert compiled(torch.empty(num_tokens)) == expert_capacity(num_tokens, 8, 2, factor)
