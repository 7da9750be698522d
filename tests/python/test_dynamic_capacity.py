"""dynamic_capacity, and capacities rounded down: against fractions, for every kind of number."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, example, given
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import torchmoe
from float_types import FLOATS
from torchmoe import dynamic_capacity, expert_capacity
from torchmoe.nn import Capacity

F64 = torch.float64
INF, NAN = math.inf, math.nan


# --- dynamic_capacity ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usage", "num_slots", "factor", "expected"),
    [
        # The even share is 10; relative loads 0.4, 0.8, 1.2 and 1.6.
        ([0.1, 0.2, 0.3, 0.4], 40, 1, [10, 10, 12, 16]),
        # 11, 13.2 and 17.6.
        ([0.1, 0.2, 0.3, 0.4], 40, 1.1, [11, 11, 14, 18]),
        # The even share is 2.5, and 6.25 for a load of 2.5 times the mean.
        ([1, 1, 1, 5], 10, 1, [3, 3, 3, 7]),
        ([1, 1, 1, 5], 16, 0.5, [2, 2, 2, 5]),
        ([1, 1, 1, 5], 16, Fraction(1, 3), [2, 2, 2, 4]),  # 4/3 and 10/3
        ([1, 1, 1, 5], 16, Decimal("0.25"), [1, 1, 1, 3]),  # 1 and 2.5
        # All of the load: all of the slots, and never more.
        ([1, 0, 0, 0], 16, 1, [16, 4, 4, 4]),
        ([1, 0, 0, 0], 16, 2, [16, 8, 8, 8]),
        ([1, 1, 1, 5], 16, 4, [16, 16, 16, 16]),
        ([1, 1, 1, 5], 16, 1e300, [16, 16, 16, 16]),
        ([1, 1, 1, 5], 16, Fraction(10**300, 7), [16, 16, 16, 16]),
        ([1, 1, 1, 5], 16, 0, [0, 0, 0, 0]),
        ([1, 1, 1, 5], 1, 1, [1, 1, 1, 1]),
        ([1, 1, 1, 5], 0, 1, [0, 0, 0, 0]),
        ([0.7], 9, 1, [9]),
        ([0.7], 9, 0.5, [5]),
        ([], 9, 1, []),
    ],
)
def test_worked_by_hand(
    usage: list[float], num_slots: int, factor: float, expected: list[int]
) -> None:
    for slots in (num_slots, torch.tensor(num_slots), torch.tensor(num_slots, dtype=torch.int32)):
        for dtype in (torch.float32, F64):
            capacity = dynamic_capacity(torch.tensor(usage, dtype=dtype), slots, factor)
            assert capacity.dtype == torch.int64
            assert capacity.tolist() == expected


def test_factor_is_one_unless_given() -> None:
    usage = torch.tensor([0.5, 0.25, 0.25])
    assert torch.equal(dynamic_capacity(usage, 24), dynamic_capacity(usage, 24, 1))
    assert dynamic_capacity(usage, 24).tolist() == [12, 8, 8]


@pytest.mark.parametrize(
    ("above", "expected"), [(0.0, 1000), (4e-7, 1000), (9e-7, 1000), (2e-6, 1001), (1e-3, 1001)]
)
def test_an_excess_below_a_millionth_does_not_round_up(above: float, expected: int) -> None:
    usage = torch.tensor([1 + above, 1 - above], dtype=F64)
    assert dynamic_capacity(usage, 2000).tolist() == [expected, 1000]


@pytest.mark.parametrize("num_experts", [1, 3, 5, 6, 7, 10, 13, 64, 257])
@pytest.mark.parametrize("dtype", FLOATS)
def test_an_even_load_gives_the_usual_capacity(num_experts: int, dtype: torch.dtype) -> None:
    """Although 1 / E and its mean are rounded."""
    usage = torch.full((num_experts,), 1 / num_experts, dtype=dtype)
    for num_tokens in (0, 1, num_experts, 3 * num_experts + 1, 1000, 12345):
        for factor in (1, 0.9, 1.1):
            usual = expert_capacity(num_tokens, num_experts, 1, factor)
            capacity = dynamic_capacity(usage, num_tokens, factor)
            assert capacity.tolist() == [usual] * num_experts


@pytest.mark.parametrize(
    "usage",
    [
        [0.0, 0.0, 0.0],
        [NAN, NAN, NAN],
        [NAN, 5.0, 1.0],
        [INF, 5.0, 1.0],
        [INF, NAN, -INF],
        [1e308, 1e308, 1e308],
    ],
)
def test_a_load_without_a_mean_counts_as_even(usage: list[float]) -> None:
    for num_slots in (0, 10):
        capacity = dynamic_capacity(torch.tensor(usage, dtype=F64), num_slots)
        assert capacity.tolist() == [expert_capacity(num_slots, 3, 1, 1)] * 3


def exact(usage: list[float], num_slots: int, factor: Fraction) -> list[int] | None:
    """The formula and its rule; None where rounding in float64 may decide the rule."""
    loads = [Fraction(load) for load in usage]
    mean = sum(loads) / len(loads)
    capacities = []
    for load in loads:
        relative = max(Fraction(1), load / mean) if mean > 0 else Fraction(1)
        places = relative * factor * num_slots / len(loads)
        whole = math.floor(places)
        excess, allowed = places - whole, places / 10**6
        if abs(excess - allowed) < places / 10**12:
            return None
        capacities.append(min(whole + (excess > allowed), num_slots))
    return capacities


LOADS = st.floats(0, 1000, width=32) | st.integers(0, 20).map(float)


@given(
    usage=st.lists(LOADS, min_size=1, max_size=9),
    num_slots=st.integers(0, 10**7) | st.integers(0, 100),
    factor=st.decimals(0, 10, places=3) | st.fractions(0, 10, max_denominator=10**6),
)
@example(usage=[1.0, 1.0, 1.0], num_slots=10**7, factor=Fraction(1, 3))
@example(usage=[3.0, 1.0, 2.0], num_slots=999_999, factor=Fraction(1))
def test_equals_the_fraction(
    usage: list[float], num_slots: int, factor: Decimal | Fraction
) -> None:
    expected = exact(usage, num_slots, Fraction(factor))
    assume(expected is not None)
    tensor = torch.tensor(usage, dtype=F64)
    assert dynamic_capacity(tensor, num_slots, factor).tolist() == expected
    assert dynamic_capacity(tensor, torch.tensor(num_slots), factor).tolist() == expected


@given(st.lists(st.integers(0, 10**5), min_size=1, max_size=9))
def test_with_the_current_load_in_both_places_it_would_refuse_nothing(counts: list[int]) -> None:
    """Why the load in the factor is history."""
    load = torch.tensor(counts)
    capacity = dynamic_capacity(load.double() / max(sum(counts), 1), sum(counts))
    assert (capacity >= load).all()


def test_only_the_proportions_of_the_load_matter() -> None:
    usage = torch.tensor([1.0, 2.0, 5.0, 0.0])
    for scale in (1e-30, 0.25, 3.0, 1e30):
        assert torch.equal(dynamic_capacity(usage * scale, 77), dynamic_capacity(usage, 77))


def test_what_history_decides() -> None:
    """The batch asks for the same of every expert; the one with a history may take it all."""
    indices = torch.tensor([0, 1, 2, 3]).repeat(4).view(8, 2)
    asked = indices.clone()
    asked[:, 0] = 0  # 8 slots, expert 1 and 3 get 4 each
    for usage, kept in (([1.0, 1, 1, 1], [4, 4, 0, 4]), ([5.0, 1, 1, 1], [8, 4, 0, 4])):
        capacity = dynamic_capacity(torch.tensor(usage), asked.numel())
        served = torchmoe.ops.limit_capacity(asked, capacity)
        assert [int((served == e).sum()) for e in range(4)] == kept


def test_compiles_once_for_all_token_counts() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def f(x: Tensor, usage: Tensor) -> tuple[Tensor, Tensor]:
        return (
            dynamic_capacity(usage, 2 * x.shape[0], 1.1),
            dynamic_capacity(usage, 2 * (x > 0).sum(), 1.1),
        )

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    usage = torch.tensor([0.4, 0.3, 0.2, 0.1])
    for num_tokens in (200, 5, 77):
        x = torch.randn(num_tokens)
        expected = f(x, usage)
        assert not torch.equal(*expected)
        for got, wanted in zip(compiled(x, usage), expected, strict=True):
            assert torch.equal(got, wanted)
    assert counter.frame_count == 1


def test_runs_on_the_meta_device() -> None:
    usage = torch.empty(4, device="meta")
    assert dynamic_capacity(usage, 10).shape == (4,)
    assert dynamic_capacity(usage, torch.tensor(10, device="meta")).dtype == torch.int64


EVEN = torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((EVEN, 8, -0.5), ValueError, r"factor must be a finite number >= 0, got -0\.5"),
        ((EVEN, 8, NAN), ValueError, r"factor must be a finite number >= 0, got nan"),
        ((EVEN, 8, INF), ValueError, r"factor must be a finite number >= 0, got inf"),
        ((EVEN, 8, "1"), TypeError, r"factor must be a number, got '1'"),
        ((EVEN, 8, True), TypeError, r"factor must be a number, got True"),
        ((EVEN, -1), ValueError, r"num_slots must be >= 0, got -1"),
        ((EVEN, torch.tensor(-4)), ValueError, r"num_slots must be >= 0, got -4"),
        ((EVEN, torch.tensor(NAN)), ValueError, r"num_slots must be an int or an int64 .*float32"),
        ((EVEN, torch.tensor([8])), RuntimeError, r"num_slots must be .* scalar, got shape \[1\]"),
        ((EVEN, 3.7), TypeError, r"num_slots must be an int or tensor, got 3.7"),
        (
            (EVEN.unsqueeze(0), 8),
            RuntimeError,
            r"usage must be \[num_experts\] and floating, got torch.float32 of shape \[1, 4\]",
        ),
        (
            (EVEN.long(), 8),
            RuntimeError,
            r"usage must be \[num_experts\] and floating, got torch.int64 of shape \[4\]",
        ),
    ],
)
def test_errors(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^dynamic_capacity: {message}$"):
        dynamic_capacity(*arguments)


# --- rounding down ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "up", "down"),
    [
        ((12, 4, 2, 0.5), 3, 3),
        ((12, 4, 2, 0.9), 6, 5),  # 5.4
        ((12, 4, 2, 1.1), 7, 6),  # 6.6
        ((12, 4, 2, 1.25), 8, 7),  # 7.5
        ((200, 4, 2, 1.1), 110, 110),
        ((3, 4, 1, 1.0), 1, 0),
        ((3, 4, 1, 1.0, 2), 2, 2),
        ((3, 4, 1, 1.0, 9), 3, 3),
        ((3, 4, 1, 1e30), 3, 3),
        ((0, 4, 1, 1.0, 9), 0, 0),
        ((7, 3, 2, Fraction(3, 7)), 2, 2),
        ((7, 3, 2, 3 / 7), 2, 2),
        ((7, 3, 2, Decimal("0.428571")), 2, 1),
        ((7, 3, 2, Decimal("0.4285714285714")), 2, 2),
    ],
)
def test_rounding_worked_by_hand(arguments: tuple[object, ...], up: int, down: int) -> None:
    for rounding, expected in (("up", up), ("down", down)):
        assert expert_capacity(*arguments, rounding=rounding) == expected
        tokens = torch.tensor(arguments[0])
        assert expert_capacity(tokens, *arguments[1:], rounding=rounding).item() == expected
    assert expert_capacity(*arguments) == up


@given(
    num_tokens=st.integers(0, 10**6),
    num_experts=st.integers(8, 512),
    top_k=st.integers(1, 8),
    factor=st.decimals(0, 100, places=6) | st.fractions(0, 4, max_denominator=10**6),
    minimum=st.integers(0, 50),
)
def test_down_equals_the_floor_of_the_fraction(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    factor: Decimal | Fraction,
    minimum: int,
) -> None:
    slots = math.floor(Fraction(factor) * top_k * num_tokens / num_experts)
    expected = min(max(slots, minimum), num_tokens)
    arguments = num_experts, top_k, factor, minimum, "down"
    assert expert_capacity(num_tokens, *arguments) == expected
    assert expert_capacity(torch.tensor(num_tokens), *arguments).item() == expected


def test_unknown_rounding() -> None:
    with pytest.raises(
        ValueError, match=r'^expert_capacity: rounding must be one of "up", "down", got'
    ):
        expert_capacity(8, 4, 2, 1.0, 0, "nearest")


# --- the same by a layer's Capacity -------------------------------------------------------------


def test_capacity_rounds_as_asked() -> None:
    given = {"training": True}
    assert Capacity(1.25).slots(10, 4, 1, **given) == 4
    down = Capacity(1.25, rounding="down")
    assert down.slots(10, 4, 1, **given) == 3  # 3.125
    assert down.slots(torch.tensor(10), 4, 1, **given).item() == 3
    assert down.slots(1, 4, 1, **given) == 0
    floored = Capacity(1.25, eval_factor=2.1, minimum=4, rounding="down")
    assert floored.slots(10, 4, 1, **given) == 4
    assert floored.slots(3, 4, 1, **given) == 3
    assert floored.slots(10, 4, 1, training=False) == 5  # 5.25
    third = Capacity(Fraction(1, 3), rounding="down")
    assert third.slots(12, 4, 1, **given) == 1
    assert third.slots(torch.tensor(12), 4, 1, **given).item() == 1


def test_dynamic_capacity_of_a_layer() -> None:
    usage = torch.tensor([0.1, 0.2, 0.3, 0.4])
    capacity = Capacity(1, eval_factor=0.5, dynamic=True)
    for num_tokens in (20, torch.tensor(20)):
        given = {"usage": usage, "training": True}
        assert capacity.slots(num_tokens, 4, 2, **given).tolist() == [10, 10, 12, 16]
        given = {"usage": usage, "training": False}
        assert capacity.slots(num_tokens, 4, 2, **given).tolist() == [5, 5, 6, 8]
        # At least the minimum, and at most one slot of each token.
        given = {"usage": torch.tensor([1.0, 0, 0, 0]), "training": True}
        assert capacity.slots(num_tokens, 4, 2, **given).tolist() == [20, 10, 10, 10]
        least = Capacity(1, minimum=13, dynamic=True)
        assert least.slots(num_tokens, 4, 2, **given).tolist() == [20, 13, 13, 13]
        least = Capacity(1, minimum=99, dynamic=True)
        assert least.slots(num_tokens, 4, 2, **given).tolist() == [20] * 4
    for nothing in (0, torch.tensor(0)):
        assert (
            Capacity(1, minimum=3, dynamic=True)
            .slots(nothing, 4, 2, usage=usage, training=True)
            .tolist()
            == [0] * 4
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rounding": "nearest"},
            r'Capacity: rounding must be one of "up", "down", got "nearest"',
        ),
        (
            {"rounding": "down", "dynamic": True},
            r'Capacity: rounding must be "up" with dynamic=True, got "down"',
        ),
    ],
)
def test_capacity_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Capacity(1.0, **options)


@pytest.mark.parametrize("slots", [1_000_003, 2**31 + 1, 10**12 + 7])
@pytest.mark.parametrize("experts", [3, 49, 200])
def test_an_exact_share_is_that_share_however_large(experts: int, slots: int) -> None:
    """Products in float64 may fall a few units short of a whole number."""
    usage = torch.full((experts,), 1 / experts, dtype=torch.float64)
    assert (torchmoe.dynamic_capacity(usage, experts * slots) == slots).all()


def test_numbers_that_mean_nothing_give_a_number() -> None:
    for usage in ([1.0, -1.0], [0.0, 0.0], [math.inf, 1.0], [-math.inf, math.inf]):
        for factor in (0, 1, 10**400):
            capacity = torchmoe.dynamic_capacity(torch.tensor(usage), 10, factor)
            assert ((capacity >= 0) & (capacity <= 10)).all()
