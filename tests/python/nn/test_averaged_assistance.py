"""Who is assisted in an average of models, and in a state of bools and integers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from torch.testing import assert_close

from torchmoe.nn import Assistance, MoE

H, INNER, E, K, T = 6, 5, 4, 2, 30
RING = (1, 2, 3, 0)


def make(*assisted: int) -> MoE:
    torch.manual_seed(0)
    moe = MoE(H, INNER, E, K, assistance=Assistance(RING))
    moe.assistance.assisted[list(assisted)] = 1
    return moe


def helpers(moe: MoE, selected: Tensor) -> list[int]:
    return moe.assistance(selected)[:, -1].tolist()


EMA = [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
EACH = torch.tensor([[0, 2], [1, 3], [2, 0], [3, 1]])  # every expert first once


@pytest.mark.parametrize(
    ("average", "weights"),
    [
        ({}, [1 / 5] * 5),
        ({"multi_avg_fn": get_ema_multi_avg_fn(0.5)}, EMA),
        ({"avg_fn": get_ema_avg_fn(0.5)}, EMA),
    ],
    ids=["plain", "exponential", "exponential_one_by_one"],
)
def test_an_average_assists_whom_most_of_it_does(
    average: dict[str, Any], weights: list[float]
) -> None:
    """The first model is the average's beginning; expert 0 only there, 1 always, 2 later."""
    moe = make(0, 1)
    averaged = AveragedModel(moe, use_buffers=True, **average)
    states = [[1, 1, 0, 0], [0, 1, 0, 0], *[[0, 1, 1, 0]] * 3]
    states = [torch.tensor(state).float() for state in states]
    for count, state in enumerate(states):
        moe.assistance.assisted.copy_(state)
        moe.assistance.updates_above.fill_(count)
        averaged.update_parameters(moe)
    share = sum(weight * state for weight, state in zip(weights, states, strict=True))
    mean = averaged.module.assistance
    assert_close(mean.assisted, share)
    count = sum(weight * i for i, weight in enumerate(weights))
    assert_close(mean.updates_above, torch.full((E,), count))
    assert helpers(averaged.module, EACH[:, :1]) == [-1, RING[1], RING[2], -1]


def test_an_average_of_equal_models_is_the_model() -> None:
    moe, x = make(0, 2), torch.randn(T, H)
    moe.assistance.updates_above.copy_(torch.tensor([7.0, 0, 123, 1]))
    for average in ({}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}):
        averaged = AveragedModel(moe, use_buffers=True, **average)
        for _ in range(9):
            averaged.update_parameters(moe)
        assert_close(dict(averaged.module.state_dict()), dict(moe.state_dict()))
        assert torch.equal(averaged(x).routing.selected, moe(x).routing.selected)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_of_bools_and_integers_loads(assign: bool) -> None:
    """Checkpoints may hold it so."""
    moe = make(0, 2)
    moe.assistance.updates_above[2] = 7
    state = moe.state_dict()
    state["assistance.assisted"] = state["assistance.assisted"].bool()
    state["assistance.updates_above"] = state["assistance.updates_above"].long()
    loaded, placed = make(), make()
    loaded.load_state_dict(state, assign=assign)
    assert loaded.assistance.assisted.dtype == torch.float32
    placed.assistance.assisted = state["assistance.assisted"].clone()
    placed.assistance.updates_above = state["assistance.updates_above"].clone()
    for other in (loaded, placed, copy.deepcopy(placed).bfloat16()):
        assert helpers(other, EACH) == helpers(moe, EACH)
    for layer in (moe, loaded, placed):
        layer.assistance.update(torch.tensor([0.9, 0.0, 0.9, 0.3]), torch.tensor(10))
        assert layer.assistance.updates_above.tolist() == [1, 0, 8, 0]
        assert layer.assistance.updates_above.dtype == torch.float32
        assert layer.assistance.assisted.tolist() == [1, 0, 1, 0]
