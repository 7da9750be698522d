"""Weights that are constant: refused where a router could learn and would not, else a choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import functional_call

from torchmoe.nn import Balance, Capacity, CosineRouter, Gate, MoE, SequenceRouter

T, H, INNER, E = 12, 6, 5, 4

CONSTANT: list[tuple[int, dict[str, Any]]] = [
    (2, {"gate": Gate(normalize="uniform")}),
    (2, {"gate": Gate("sigmoid", normalize="uniform")}),
    (1, {"gate": Gate(normalize="topk")}),
    (2, {"gate": Gate(normalize="uniform"), "capacity": Capacity(1, priority="weight")}),
    (2, {"gate": Gate(normalize="uniform"), "router": CosineRouter(H, E)}),
    (2, {"gate": Gate(normalize="uniform"), "router": SequenceRouter(CosineRouter(H, E))}),
]


@pytest.mark.parametrize(("top_k", "options"), CONSTANT)
def test_a_frozen_router_is_a_choice(top_k: int, options: dict[str, Any]) -> None:
    moe = MoE(H, INNER, E, top_k, balance=Balance(weight=0.0), **options)
    moe.router.requires_grad_(False)
    x = torch.randn(3, T // 3, H, requires_grad=True)
    output = moe(x)
    output.hidden_states.square().sum().backward()

    again = x.detach().clone().requires_grad_()
    routing = output.routing
    y = moe.experts(again.view(T, H), routing.indices, routing.weights.detach())
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    expected = 1 / top_k
    assert bool((routing.weights == expected).all())

    # The layer's router counts, also where other tensors take its parameters' place.
    lent = {name: p.detach().clone() for name, p in moe.named_parameters()}
    assert torch.equal(functional_call(moe, lent, (x,)).hidden_states, output.hidden_states)


@pytest.mark.parametrize(("top_k", "options"), CONSTANT)
def test_a_router_that_could_learn_is_not(top_k: int, options: dict[str, Any]) -> None:
    moe = MoE(H, INNER, E, top_k, **options).requires_grad_(True)
    x = torch.randn(3, T // 3, H)
    with pytest.raises(ValueError, match=r"^gate_weights: estimator must be .straight_through."):
        moe(x)
    with torch.no_grad():
        moe(x)
    moe.router.requires_grad_(False)
    moe(x)


def test_weights_that_move_pass_on_x_s_gradient_through_a_frozen_router() -> None:
    moe = MoE(H, INNER, E, 2, dtype=torch.float64)
    moe.router.requires_grad_(False)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    output = moe(x)
    (whole,) = torch.autograd.grad(output.hidden_states.sum(), x)
    again = x.detach().clone().requires_grad_()
    y = moe.experts(again, output.routing.indices, output.routing.weights.detach())
    (of_experts,) = torch.autograd.grad(y.sum(), again)
    assert bool((whole - of_experts).abs().max() > 1e-3)
