"""Published numbers of one small fixture, to eleven digits, from logits to capacity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torchmoe
from torchmoe import ops

T, E, K = 12, 4, 2

CHOICES = "[2,1][0,1][3,2][2,1][3,1][0,2][1,2][3,1][2,0][3,0][1,2][2,3]"
INDICES = torch.tensor([[int(c) for c in pair.split(",")] for pair in CHOICES[1:-1].split("][")])
TOKENS_PER_EXPERT = torch.tensor([4, 7, 8, 5])

KEPT = {
    "choice": [[1, 5, 8], [0, 6, 10], [0, 3, 8], [2, 4, 7]],
    "token": [[1, 5, 8], [0, 1, 3], [0, 2, 3], [2, 4, 7]],
}


@pytest.fixture
def logits() -> Tensor:
    t = torch.arange(T, dtype=torch.float64)[:, None]
    e = torch.arange(E, dtype=torch.float64)[None, :]
    return 2 * torch.sin(1.7 * t + 0.9 * e + 0.3 * t * e)


def test_indices(logits: Tensor) -> None:
    assert torch.equal(ops.select_experts(logits, K), INDICES)


def test_tokens_per_expert() -> None:
    assert torch.equal(ops.dispatch_plan(INDICES, E).expert_offsets.diff(), TOKENS_PER_EXPERT)


@pytest.mark.parametrize(
    ("fraction", "number"),
    [
        (TOKENS_PER_EXPERT / (K * T), 1.0243044476),
        (TOKENS_PER_EXPERT / T, 2.0486088952),
        (torch.tensor([2, 2, 4, 4]) / T, 1.0087047519),
    ],
    ids=["share_of_slots", "per_token", "first_choices"],
)
def test_load_balancing_loss(logits: Tensor, fraction: Tensor, number: float) -> None:
    # A float32 fraction would cost the last digits.
    fraction = (fraction * K * T).round().double() / (K * T)
    loss = ops.load_balancing_loss(logits, fraction, score_function="softmax")
    assert loss.item() == pytest.approx(number, abs=5e-11)


def test_router_z_loss(logits: Tensor) -> None:
    assert ops.router_z_loss(logits).item() == pytest.approx(4.8198965836, abs=5e-11)


@pytest.mark.parametrize(
    ("factor", "capacity"), [(0.5, 3), (0.9, 6), (1.0, 6), (1.1, 7), (1.25, 8)]
)
def test_capacity(factor: float, capacity: int) -> None:
    assert torchmoe.expert_capacity(T, E, K, factor) == capacity


def test_capacity_takes_the_factor_as_the_decimal_number_written() -> None:
    assert torchmoe.expert_capacity(200, 4, 2, 1.1) == 110


@pytest.mark.parametrize("order", ["choice", "token"])
def test_kept_tokens_at_capacity_3(order: str) -> None:
    kept = ops.limit_capacity(INDICES, 3, order=order, num_experts=E)
    tokens = [(kept == expert).any(1).nonzero()[:, 0].tolist() for expert in range(E)]
    assert tokens == KEPT[order]
