"""Thresholds of Assistance that a load can reach: usage never exceeds 1 / K."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from copies import by_pickle
from torchmoe.nn import (
    Assistance,
    Capacity,
    ContextRouter,
    Estimator,
    ExpertChoiceRouter,
    Gate,
    MoE,
    Router,
    RouterOutput,
    known_estimators,
)

H, INNER, T = 6, 7, 16


def ring(num_experts: int) -> tuple[int, ...]:
    return tuple((i + 1) % num_experts for i in range(num_experts))


def layer(num_experts: int, top_k: int, assistance: Assistance, **options: Any) -> MoE:
    options = {"gate": Gate(normalize="none")} | options
    return MoE(H, INNER, num_experts, top_k, assistance=assistance, **options)


def crowd(moe: MoE) -> Tensor:
    """Tokens that all choose the first experts, for a router that is changed to do so."""
    with torch.no_grad():
        moe.router.weight.copy_(-torch.arange(moe.num_experts)[:, None].expand(-1, H))
    return torch.ones(T, H)


# (E, K), and the thresholds that follow.
DEFAULTS = {
    (2, 1): (1.5, 1.25),
    (3, 1): (2.0, 1.5),
    (3, 2): (1.25, 1.125),
    (4, 2): (1.5, 1.25),  # README's
    (4, 3): (7 / 6, 13 / 12),
    (5, 2): (2.0, 1.5),
    (8, 2): (2.0, 1.5),
    (8, 4): (1.5, 1.25),
    (64, 8): (2.0, 1.5),
}


@pytest.mark.parametrize(("sizes", "expected"), DEFAULTS.items(), ids=str)
def test_the_defaults_can_be_reached(sizes: tuple[int, int], expected: tuple[float, float]) -> None:
    """By the highest load there is, in as many updates as the average takes to remember it."""
    num_experts, top_k = sizes
    moe = layer(num_experts, top_k, Assistance(ring(num_experts)))
    assistance = moe.assistance
    assert (assistance.threshold, assistance.lower_threshold) == pytest.approx(expected, rel=1e-15)
    routing = moe(crowd(moe)).routing
    assert routing.tokens_per_expert.tolist() == [T] * top_k + [0] * (num_experts - top_k)
    moe.router.usage_decay = 0.9
    for _ in range(assistance.patience + 100):
        moe.update(routing)
    assert (moe.router.usage <= 1 / top_k).all()
    assert assistance.assisted.tolist() == [True] * top_k + [False] * (num_experts - top_k)
    # An even load ends it.
    even = routing._replace(tokens_per_expert=torch.full((num_experts,), top_k))
    for _ in range(100):
        moe.update(even)
    assert not assistance.assisted.any()


@pytest.mark.parametrize(("sizes"), DEFAULTS, ids=str)
def test_thresholds_out_of_reach_are_refused(sizes: tuple[int, int]) -> None:
    num_experts, top_k = sizes
    most = num_experts / top_k
    just_below = Assistance(ring(num_experts), threshold=most - 1e-6)
    assert layer(num_experts, top_k, just_below).assistance.threshold == most - 1e-6
    if top_k == 1:  # without a layer
        message = rf"^Assistance: threshold must be in \(0, {num_experts}\), up to the load of an "
        with pytest.raises(ValueError, match=message + f"expert that .* slot, got {most}$"):
            Assistance(ring(num_experts), threshold=most)
        return
    message = (
        rf"^MoE: assistance\.threshold must be below num_experts / top_k = {most}, the load of an "
        f"expert that every token chooses, got {most}$"
    )
    with pytest.raises(ValueError, match=message):
        layer(num_experts, top_k, Assistance(ring(num_experts), threshold=most))


def test_given_thresholds_stay() -> None:
    for given in ((1.9, 1.2), (1.6, 1.6), (0.5, 0.25)):
        assistance = Assistance(ring(4), threshold=given[0], lower_threshold=given[1])
        moe = layer(4, 2, assistance)
        assert (moe.assistance.threshold, moe.assistance.lower_threshold) == given
    # The lower one follows only where 1.5 would be above the other.
    for threshold, lower in ((3.0, 1.5), (1.6, 1.5), (1.5, 1.5), (1.2, 1.1), (0.8, 0.8)):
        assistance = Assistance(ring(8), threshold=threshold)
        moe = layer(8, 2, assistance)
        assert (assistance.threshold, assistance.lower_threshold) == pytest.approx(
            (threshold, lower)
        )
    assert layer(4, 2, Assistance(ring(4), lower_threshold=1.0)).assistance.threshold == 1.5
    message = r"^Assistance: lower_threshold must be in \(0, threshold\] = \(0, 1.5\], got 1.8$"
    with pytest.raises(ValueError, match=message):
        layer(4, 2, Assistance(ring(4), lower_threshold=1.8))


def test_copies_have_the_layers_thresholds() -> None:
    moe = layer(4, 2, Assistance(ring(4)))
    other = by_pickle(moe)
    assert other.assistance.extra_repr() == moe.assistance.extra_repr()
    assert "threshold=1.5, lower_threshold=1.25" in moe.assistance.extra_repr()


def test_a_layer_in_which_every_token_has_every_expert() -> None:
    message = (
        r"^MoE: assistance must be None with top_k 4, where every token has every expert already, "
        r"got Assistance\(backup=\(1, 2, 3, 0\), .*\)$"
    )
    for assistance in (Assistance(ring(4)), Assistance(ring(4), threshold=0.5)):
        with pytest.raises(ValueError, match=message):
            layer(4, 4, assistance)


@pytest.mark.parametrize("name", known_estimators())
def test_every_estimator_of_the_library_fills_its_slots(name: str) -> None:
    with pytest.raises(ValueError, match=r"^MoE: assistance\.threshold must be below .* = 2.0"):
        layer(4, 2, Assistance(ring(4), threshold=2.0), gate=Gate(estimator=name))


# ---- where a token may get fewer experts, and an expert more than 1 / K of the slots


class Best(Estimator):
    """Leaves the second slot empty."""

    fills_slots = False

    def select(self, logits: Tensor, **options: Any) -> Tensor:
        indices = super().select(logits, **options)
        return torch.cat([indices[:, :1], torch.full_like(indices[:, 1:], -1)], dim=1)


class BestRouter(ContextRouter):
    """The same by a router that chooses."""

    chooses = True
    keeps_usage = True
    num_experts = 4

    def __init__(self) -> None:
        super().__init__()
        self.router = Router(H, 4, track_usage=True)

    @property
    def usage(self) -> Tensor:
        return self.router.usage

    @property
    def weight(self) -> Tensor:
        return self.router.weight

    def update(self, *arguments: Any) -> None:
        self.router.usage_decay = 0.9
        self.router.update(*arguments)

    def forward(self, x: Tensor, router_input: Any = None, token_mask: Any = None) -> RouterOutput:
        logits = self.router(x)
        return RouterOutput(logits, logits.argmax(-1, keepdim=True))


@pytest.mark.parametrize("top_k", [2, 4])
@pytest.mark.parametrize("by", ["estimator", "router"])
def test_a_choice_of_fewer_experts_reaches_higher_thresholds(by: str, top_k: int) -> None:
    assistance = Assistance(ring(4), threshold=3.0)
    options = {"estimator": {"gate": Gate(estimator=Best(), normalize="none")}}
    moe = layer(4, top_k, assistance, **options.get(by, {"router": BestRouter()}))
    moe.router.usage_decay = 0.9
    routing = moe(crowd(moe)).routing
    for _ in range(200):
        moe.update(routing)
    assert assistance.assisted.tolist() == [True, False, False, False]
    assert layer(4, top_k, Assistance(ring(4)), **options.get(by, {"router": BestRouter()}))


def test_experts_that_choose() -> None:
    router = ExpertChoiceRouter(Router(H, 4, track_usage=True), 2, most_per_token=1)
    moe = layer(4, 2, Assistance(ring(4)), router=router, capacity=Capacity(2.0))
    assert moe.assistance.threshold == 2.0
