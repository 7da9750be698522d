"""Layers that draw and depend on other tokens, for passes to be replayed."""

from __future__ import annotations

import torch

from torchmoe.nn import (
    Assistance,
    Balance,
    Capacity,
    Decision,
    Gate,
    MoE,
    Router,
)

H, INNER, E, K, T = 6, 7, 5, 2, 23


def random_layer(*, logit_noise: float = 0.0, **options: object) -> MoE:
    """Whatever can draw or depend on the other tokens on the way to the ids does."""
    options = {
        "gate": Gate(estimator="gumbel_straight_through"),
        "capacity": Capacity(0.9, priority="random", overflow="next_best"),
    } | options
    moe = MoE(
        H,
        INNER,
        E,
        K,
        assistance=Assistance((1, 2, 3, 4, 0)),
        router=Router(H, E, logit_noise=logit_noise, track_usage=True),
        balance=Balance(z_loss_weight=0.01),
        **options,
    )
    moe.assistance.assisted.fill_(True)
    return moe


def same(one: Decision, other: Decision) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True))
