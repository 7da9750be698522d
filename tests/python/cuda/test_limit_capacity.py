"""limit_capacity, whose result depends on every slot before: the CPU op's over random tables."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from float_types import FLOATS
from on_device import moved
from op_case import Inputs, call
from situations import INT64_MAX, INT64_MIN

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("default")]

ODD = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 2.0)


def table(
    tokens: int, top_k: int, experts: int, *, order: str, priority: bool, overflow: str,
    room: float, skew: float, dtype: torch.dtype, seed: int,
) -> Inputs:  # fmt: skip
    """Ids that prefer low experts the more, the larger the skew, some of them out of range."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def numbers(*shape: int) -> torch.Tensor:
        """Few different ones, so that ties occur."""
        which = torch.randint(0, len(ODD) + 8, shape, generator=generator)
        values = torch.tensor([*ODD, *(i / 8 for i in range(8))], dtype=torch.float64)
        return values[which].to(dtype)

    indices = (uniform(tokens, top_k) ** skew * experts).long().clamp(max=experts - 1)
    odd = torch.tensor([-1, experts, experts + 7, INT64_MIN, INT64_MAX])
    spoiled = uniform(tokens, top_k) < 0.1
    indices[spoiled] = odd[torch.randint(0, 5, (int(spoiled.sum()),), generator=generator)]
    capacity = (uniform(experts) * 2 * room * tokens * top_k / experts).long()
    capacity[uniform(experts) < 0.1] = 0
    capacity[uniform(experts) < 0.05] = INT64_MAX
    steps = torch.randint(1, max(experts, 2), (experts,), generator=generator)
    return {
        "indices": indices,
        "capacity": capacity,
        "order": order,
        "priority": numbers(tokens, top_k) if priority else None,
        "overflow": overflow,
        "scores": None if overflow == "drop" else numbers(tokens, experts),
        "backup": (torch.arange(experts) + steps) % experts if overflow == "backup" else None,
    }


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 150),
    top_k=st.integers(1, 5),
    experts=st.integers(2, 70),
    room=st.floats(0.0, 1.5),
    skew=st.floats(1.0, 6.0),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("overflow", ["drop", "next_best", "backup"])
@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize("order", ["choice", "token"])
def test_any_table(
    tokens: int, top_k: int, experts: int, order: str, priority: bool, overflow: str,
    room: float, skew: float, dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    inputs = table(
        tokens, top_k, experts, order=order, priority=priority, overflow=overflow, room=room,
        skew=skew, dtype=dtype, seed=seed,
    )  # fmt: skip
    (actual,) = call("limit_capacity", moved(inputs))
    (expected,) = call("limit_capacity", inputs)
    assert torch.equal(actual.cpu(), expected)
    assert torch.equal(expected, reference.limit_capacity(**inputs))


@pytest.mark.parametrize("overflow", ["drop", "next_best", "backup"])
@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize("order", ["choice", "token"])
@pytest.mark.parametrize("sizes", [(20_000, 8, 256), (5_000, 2, 8), (700, 40, 1500)], ids=str)
def test_large_tables(
    sizes: tuple[int, int, int], order: str, priority: bool, overflow: str
) -> None:
    inputs = table(
        *sizes, order=order, priority=priority, overflow=overflow, room=0.6, skew=2.0,
        dtype=torch.float32, seed=7,
    )  # fmt: skip
    (actual,) = call("limit_capacity", moved(inputs))
    assert torch.equal(actual.cpu(), call("limit_capacity", inputs)[0])
