"""The tools of torchmoe.testing on layers that learn in update, or rank by scores and a bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from torchmoe.nn import Balance, Capacity, Gate, MoE, Router
from torchmoe.testing import check_surrogate, compare_estimators, gradcheck

H, INNER, E, K, T = 6, 5, 4, 2, 20


LAYERS: dict[str, Callable[[], dict[str, Any]]] = {
    "selection_bias": lambda: {
        "gate": Gate("sigmoid"),
        "balance": Balance(selection_bias_rate=0.001),
    },
    "groups": lambda: {"gate": Gate(num_groups=4, top_groups=3)},
    "history": lambda: {"balance": Balance(fraction_from="history")},
    "dynamic": lambda: {"capacity": Capacity(1, dynamic=True)},
    "default_vector": lambda: {"gate": Gate(estimator="default_vector")},
    "usage_scaling": lambda: {"router": Router(H, E, usage_scaling=True)},
}


@pytest.mark.parametrize("name", sorted(set(LAYERS) - {"usage_scaling"}))
def test_gradcheck(name: str) -> None:
    """Its hundreds of passes are no training that lacks updates."""
    assert gradcheck(MoE(H, INNER, E, K, **LAYERS[name]()), (torch.randn(T, H),))


@pytest.mark.parametrize("name", list(LAYERS))
def test_compare_estimators(name: str) -> None:
    moe = MoE(H, INNER, E, K, **LAYERS[name]())
    compare_estimators(
        moe,
        [torch.randn(T, H)],
        lambda y, batch: (y - batch).square().mean(),
        estimators=["exact", "straight_through"] if name != "default_vector" else None,
        seeds=60,
        warm_up=0,
    )


@pytest.mark.parametrize("name", ["selection_bias", "history", "dynamic"])
def test_check_surrogate(name: str) -> None:
    options = LAYERS[name]()
    gate = options.pop("gate", Gate())
    assert check_surrogate("straight_through", score_function=gate.score_function, **options)
