"""A layer whose `update` is never called says so, once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from torchmoe.nn import Assistance, Balance, Capacity, Gate, MoE, Router, SequenceRouter

T, H, INNER, E, K = 4, 6, 5, 4, 2

READERS: dict[str, Callable[[], dict[str, Any]]] = {
    'balance.fraction_from "history"': lambda: {"balance": Balance(fraction_from="history")},
    "a dynamic capacity": lambda: {"capacity": Capacity(1, dynamic=True)},
    "assistance": lambda: {"assistance": Assistance((1, 2, 3, 0))},
    "a selection bias": lambda: {"balance": Balance(selection_bias_rate=0.001)},
    "usage_scaling": lambda: {"router": SequenceRouter(Router(H, E, usage_scaling=True))},
    "the estimator DefaultVector": lambda: {"gate": Gate(estimator="default_vector")},
}


def layer(reader: str = "a selection bias") -> MoE:
    return MoE(H, INNER, E, K, **READERS[reader]())


def passes(moe: MoE, number: int) -> None:
    for _ in range(number):
        moe(torch.randn(2, T, H))


@pytest.mark.parametrize("reader", list(READERS))
def test_once_after_a_hundred_passes(reader: str) -> None:
    moe = layer(reader)
    passes(moe, 99)
    message = rf"^MoE: update must be called once per optimizer step for {reader}, got 100 forward"
    with pytest.warns(UserWarning, match=message):
        passes(moe, 1)
    passes(moe, 150)  # a second one would be an error


def test_not_where_it_is_called() -> None:
    moe = layer()
    moe.update(moe(torch.randn(T, H)).routing)
    passes(moe, 120)


def test_not_where_nothing_is_remembered() -> None:
    passes(MoE(H, INNER, E, K), 120)


def test_only_training_counts() -> None:
    moe = layer().eval()
    passes(moe, 120)
    moe.train()
    with torch.no_grad():
        passes(moe, 120)
    x = torch.randn(T, H, requires_grad=True)
    for _ in range(99):  # each is recomputed once
        checkpoint(moe, x, use_reentrant=False).hidden_states.sum().backward()
    compiled = torch.compile(moe, backend="eager", fullgraph=True)
    for _ in range(5):
        compiled(x)
    with pytest.warns(UserWarning, match="update must be called"):
        passes(moe, 1)


def test_a_copy_counts_for_itself_and_the_state_knows_nothing() -> None:
    moe = layer()
    keys = set(moe.state_dict())
    passes(moe, 60)
    assert set(moe.state_dict()) == keys
    copied = copy.deepcopy(moe)
    passes(copied, 39)
    with pytest.warns(UserWarning, match="update must be called"):
        passes(copied, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        passes(moe, 39)
