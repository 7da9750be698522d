"""Derivatives of every order and mode, of experts and of a layer, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from second_order import Values, forward_over_reverse, reverse_over_reverse
from torchmoe.nn import Experts, MoE

T, H, I, E, K = 7, 6, 5, 4, 2  # noqa: E741  the glossary's letter
F64 = torch.float64
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)

Function = Callable[[Values, Tensor], Tensor]


def experts_of(values: Values, x: Tensor, weights: Tensor) -> Tensor:
    """Every expert of a swiglu layer on every token, weighted with weights [T, E]."""
    gate, up = torch.einsum("th,eph->tep", x, values["gate_up_proj"]).chunk(2, dim=-1)
    outputs = torch.einsum("tei,ehi->teh", silu_of(gate) * up, values["down_proj"])
    return (weights.unsqueeze(-1) * outputs).sum(1)


def silu_of(u: Tensor) -> Tensor:
    return u * u.sigmoid()  # torch's silu has no forward mode over reverse


def chosen(indices: Tensor) -> Tensor:
    """One at each chosen expert [T, K, E]. torch's one_hot reads the ids, which vmap refuses."""
    return (indices.unsqueeze(-1) == torch.arange(E)).to(F64)


def plain_experts(values: Values, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return experts_of(values, x, (chosen(indices) * weights.unsqueeze(-1)).sum(1))


def plain_layer(values: Values, x: Tensor) -> Tensor:
    """A default layer: its output's square and its auxiliary loss."""
    probs = (x @ values["router.weight"].T).softmax(-1)
    places = chosen(probs.topk(K).indices).sum(1)
    weights = places * probs / (places * probs).sum(-1, keepdim=True)
    inner = {n.removeprefix("experts."): v for n, v in values.items()}
    fraction = places.sum(0) / (K * len(x))
    aux = 0.01 * E * (fraction * probs.mean(0)).sum()
    return experts_of(inner, x, weights).square().sum() + aux


def layer_of(moe: MoE) -> Function:
    def function(values: Values, x: Tensor) -> Tensor:
        out = functional_call(moe, values, x)
        return out.hidden_states.square().sum() + out.aux_loss

    return function


Derivative = Callable[[Function, Values, Tensor, Values, Tensor], object]


def tangent_of(moved: tuple[Tensor, Tensor]) -> Tensor:
    return moved[1]


def with_x(f: Function) -> Callable[[Values], Tensor]:
    """The function of one dictionary that has x among its values."""
    return lambda values: f({n: v for n, v in values.items() if n != "x"}, values["x"])


DERIVATIVES: dict[str, Derivative] = {
    "grad": lambda f, v, x, dv, dx: grad(f, (0, 1))(v, x),
    "vjp": lambda f, v, x, dv, dx: vjp(f, v, x)[1](torch.tensor(2.0, dtype=F64)),
    "jvp": lambda f, v, x, dv, dx: jvp(f, (v, x), (dv, dx)),
    "linearize": lambda f, v, x, dv, dx: linearize(f, v, x)[1](dv, dx),
    "jacrev": lambda f, v, x, dv, dx: jacrev(f, (0, 1))(v, x),
    "jacfwd": lambda f, v, x, dv, dx: jacfwd(f, (0, 1))(v, x),
    "hessian": lambda f, v, x, dv, dx: hessian(f, 1)(v, x),
    "third": lambda f, v, x, dv, dx: jvp(
        grad(lambda x: tangent_of(jvp(grad(f, 1), (v, x), (dv, dx))).sum()), (x,), (dx,)
    ),
    "vmap_of_grad": lambda f, v, x, dv, dx: vmap(grad(f, (0, 1)), (None, 0))(v, x.unsqueeze(1)),
    "forward_over_reverse": lambda f, v, x, dv, dx: forward_over_reverse(
        with_x(f), v | {"x": x}, dv | {"x": dx}
    ),
    "reverse_over_reverse": lambda f, v, x, dv, dx: reverse_over_reverse(
        with_x(f), v | {"x": x}, dv | {"x": dx}
    ),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_of_a_default_layer(name: str) -> None:
    moe = MoE(H, I, E, K, dtype=F64)
    values = {n: p.detach() for n, p in moe.named_parameters()}
    directions = {n: torch.randn_like(v) for n, v in values.items()}
    x, dx = torch.randn(2, T, H, dtype=F64).unbind()
    derivative = DERIVATIVES[name]
    found = derivative(layer_of(moe), values, x, directions, dx)
    close(found, derivative(plain_layer, values, x, directions, dx))


@pytest.mark.parametrize("name", DERIVATIVES)
def test_of_experts(name: str) -> None:
    experts = Experts(H, I, E, dtype=F64)
    values = {n: p.detach() for n, p in experts.named_parameters()}
    directions = {n: torch.randn_like(v) for n, v in values.items()}
    x, dx = torch.randn(2, T, H, dtype=F64).unbind()
    indices = torch.rand(T, E).topk(K).indices
    if name == "vmap_of_grad":
        indices = indices[:1]
    weights = torch.rand(indices.shape, dtype=F64)

    def ours(values: Values, x: Tensor) -> Tensor:
        return functional_call(experts, values, (x, indices, weights)).square().sum()

    def plain(values: Values, x: Tensor) -> Tensor:
        return plain_experts(values, x, indices, weights).square().sum()

    derivative = DERIVATIVES[name]
    close(derivative(ours, values, x, directions, dx), derivative(plain, values, x, directions, dx))
