"""No array has as many elements as every expert's activations of every token, at any order.

Top-k routing has T K rows of I elements; computing all experts would take T E of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, linearize
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from second_order import (
    Function,
    Values,
    forward_over_reverse,
    gradient,
    inner,
    layer_loss,
    layer_values,
    reverse_over_reverse,
)
from torchmoe.nn import Experts, Gate, MoE

T, H, I, E, K = 64, 6, 8, 32, 2  # noqa: E741  the glossary's letter
# An expert's matrices, a gated token's row of twice the width, and what T E scores take, are less.
ALL = T * E * I
MOST = 2 * T * K * 2 * I
F64 = torch.float64


class Largest(TorchDispatchMode):
    """The most elements in a result; a view has those that it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0
        self.by = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.numel() > self.numbers:
                self.numbers, self.by = leaf.numel(), str(func)
        return result


def third(function: Function, values: Values, directions: Values) -> object:
    return reverse_over_reverse(
        lambda values: inner(gradient(function, values, create_graph=True), directions),
        values,
        directions,
    )


ORDERS: dict[str, Callable[[Function, Values, Values], object]] = {
    "backward": lambda f, v, d: gradient(f, {n: t.clone().requires_grad_() for n, t in v.items()}),
    "tangent": lambda f, v, d: jvp(f, (v,), (d,)),
    "linearize": lambda f, v, d: linearize(f, v)[1](d),
    "double_backward": reverse_over_reverse,
    "forward_over_reverse": forward_over_reverse,
    "tangent_of_grad": lambda f, v, d: jvp(grad(f), (v,), (d,)),
    "third": third,
}


def largest(order: str, function: Function, values: Values) -> Largest:
    directions = {name: torch.ones_like(value) for name, value in values.items()}
    with Largest() as seen:
        ORDERS[order](function, values, directions)
    assert seen.numbers >= T * K * I // 2  # it does look
    return seen


def of_experts(activation: str) -> tuple[Function, Values]:
    experts = Experts(H, I, E, activation=activation, bias=True, dtype=F64)
    indices = torch.rand(T, E).topk(K).indices
    values = {name: p.detach() for name, p in experts.named_parameters()}
    x, weights = torch.randn(T, H, dtype=F64), torch.rand(T, K, dtype=F64)

    def function(values: Values) -> Tensor:
        parameters = {n: v for n, v in values.items() if n not in ("x", "weights")}
        y = functional_call(experts, parameters, (values["x"], indices, values["weights"]))
        return y.square().sum()

    return function, values | {"x": x, "weights": weights}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_of_experts(order: str, activation: str) -> None:
    seen = largest(order, *of_experts(activation))
    assert seen.numbers <= MOST, seen.by


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("estimator", ["exact", "straight_through", "default_vector"])
def test_of_a_layer(order: str, estimator: str) -> None:
    moe = MoE(H, I, E, K, gate=Gate(estimator=estimator), bias=True, dtype=F64)
    x = torch.randn(T, H, dtype=F64)
    seen = largest(order, layer_loss(moe), layer_values(moe, x=x))
    assert seen.numbers <= MOST, seen.by


def test_all_experts_would_be_seen() -> None:
    """With as many choices as experts there are as many elements."""
    moe = MoE(H, I, E, E, dtype=F64)
    seen = largest("backward", layer_loss(moe), layer_values(moe, x=torch.randn(T, H, dtype=F64)))
    assert seen.numbers >= ALL
