"""Balancing losses of the layer: where the fractions come from, further terms, and what holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from balanced import (
    F64,
    E,
    H,
    T,
    largest_logit,
    make,
)
from torchmoe.nn import Balance, Router


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"fraction_from": "epoch"},
            ValueError,
            r'fraction_from must be one of "batch", "sequence", "global_batch", "history", '
            r'got "epoch"',
        ),
        (
            {"fraction_choices": "second"},
            ValueError,
            r'fraction_choices must be one of "all", "first", got "second"',
        ),
        (
            {"fraction_from": "history", "fraction_choices": "first"},
            ValueError,
            r'fraction_choices must be "all" with fraction_from "history", got "first"',
        ),
        (
            {"losses": [("entropy", 0.1)]},
            ValueError,
            r'losses must be one of "router_z_loss", "importance_loss", .*, got "entropy"',
        ),
        (
            {"losses": [(3, 0.1)]},
            TypeError,
            r"losses must hold a name or a function with a __name__ in each pair, got 3",
        ),
        (
            {"losses": [(nn.Identity(), 0.1)]},
            TypeError,
            r"losses must hold a name or a function with a __name__ in each pair, got Identity\(\)",
        ),
        *[
            (
                {"losses": [("load_loss", weight)]},
                ValueError,
                rf'the weight of "load_loss" must be a finite number >= 0, got {weight}',
            )
            for weight in (-0.5, math.nan, math.inf)
        ],
        *[
            (
                options,
                ValueError,
                r"losses must name every term once, router_z_loss here or by "
                r"z_loss_weight, and load_balancing_loss by weight, "
                rf'got "{name}"',
            )
            for name, options in (
                (
                    "load_loss",
                    {"losses": [("load_loss", 0.1), ("load_loss", 0.2)]},
                ),
                (
                    "router_z_loss",
                    {"z_loss_weight": 0.1, "losses": [("router_z_loss", 0.1)]},
                ),
                (
                    "largest_logit",
                    {"losses": [(largest_logit, 0.1), (largest_logit, 0.2)]},
                ),
            )
        ],
        (
            {"losses": [("load_balancing_loss", 0.1)]},
            ValueError,
            r'losses must be one of "router_z_loss", .*, got "load_balancing_loss"',
        ),
        (
            {"weight": math.nan},
            ValueError,
            r"weight must be a finite number >= 0, got nan",
        ),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^Balance: {message}$"):
        Balance(**options)


def test_a_history_needs_a_router_that_keeps_one() -> None:
    message = (
        r'^MoE: router must keep usage for balance.fraction_from "history", as '
        r"Router\(track_usage=True\) does, got Router without$"
    )
    with pytest.raises(ValueError, match=message):
        make(balance=Balance(fraction_from="history"), router=Router(H, E))
    moe = make()
    with pytest.raises(ValueError, match=message):
        moe.balance = Balance(fraction_from="history")
    assert moe.balance == Balance()


@pytest.mark.parametrize("fraction_from", ["sequence", "history"])
def test_earlier_counts_have_no_meaning_there(fraction_from: str) -> None:
    message = (
        rf'^MoE: earlier_counts must be None with fraction_from "{fraction_from}", '
        r"got a tensor of torch.int64 of shape \[8\]$"
    )
    with pytest.raises(ValueError, match=message):
        make(balance=Balance(fraction_from=fraction_from))(
            torch.randn(T, H, dtype=F64), earlier_counts=torch.arange(E)
        )


@pytest.mark.parametrize(
    ("counts", "got"),
    [
        (torch.arange(E - 1), r"torch.int64 of shape \[7\]"),
        (torch.arange(1), r"torch.int64 of shape \[1\]"),
        (torch.arange(E).unsqueeze(0), r"torch.int64 of shape \[1, 8\]"),
        (torch.ones(E), r"torch.float32 of shape \[8\]"),
    ],
)
def test_earlier_counts_must_be_counts(counts: Tensor, got: str) -> None:
    message = rf"^MoE: earlier_counts must be integers \[num_experts\] = \[8\], got {got}$"
    with pytest.raises(RuntimeError, match=message):
        make()(torch.randn(T, H, dtype=F64), earlier_counts=counts)
