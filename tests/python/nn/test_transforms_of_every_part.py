"""torch.func's transforms of a layer with every router and estimator, against plain autograd."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.utils import _pytree as pytree

from built_in import ESTIMATORS, ROUTERS, make_router
from communicating_experts import stacked, talking
from second_order import (
    Function,
    Values,
    directions_of,
    forward_over_reverse,
    gradient,
    inner,
    layer_loss,
    layer_values,
    reverse_over_reverse,
)
from torchmoe.nn import (
    Assistance,
    Balance,
    Capacity,
    ExpertList,
    Gate,
    HashRouter,
    MoE,
    WithAttachedLoss,
)

B, S, H, INNER, E, K = 3, 2, 6, 3, 5, 2
F64 = torch.float64
RING = (1, 2, 3, 4, 0)
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def make(**options: Any) -> MoE:
    inner_size = None if "experts" in options else INNER
    return MoE(H, inner_size, E, K, bias=True, dtype=F64, **options)


def of_router(kind: type[nn.Module]) -> MoE:
    return make(router=make_router(kind, H, E, K, dtype=F64))


CHOOSING: dict[str, Callable[[], MoE]] = {
    kind.__name__: partial(of_router, kind) for kind in ROUTERS
} | {name: partial(make, gate=Gate(estimator=name)) for name in ESTIMATORS}
LAYERS: dict[str, Callable[[], MoE]] = CHOOSING | {
    "capacity": lambda: make(capacity=Capacity(0.8, overflow="next_best")),
    "dynamic": lambda: make(capacity=Capacity(0.8, dynamic=True, priority="weight")),
    "assistance": lambda: make(assistance=Assistance(RING)),
    "sequence_losses": lambda: make(
        balance=Balance(
            0.5,
            z_loss_weight=0.5,
            losses=[("importance_loss", 0.5), ("mutual_information_loss", 0.5)],
            fraction_from="sequence",
        )
    ),
    "communication": lambda: make(experts=talking(stacked())),
}
DRAWN = [name for name in ESTIMATORS if ESTIMATORS[name].draws]


def case(name: str) -> tuple[Function, Values]:
    """The layer's loss, and values for it: of one sequence in a batch of one."""
    moe = LAYERS[name]()
    call = {}
    if isinstance(moe.router, HashRouter):
        call["router_input"] = torch.randint(1000, (1, S))
    return layer_loss(moe, **call), layer_values(moe, x=torch.randn(1, S, H, dtype=F64))


def leaves(values: Values) -> Values:
    return {name: value.clone().requires_grad_() for name, value in values.items()}


@pytest.mark.parametrize("name", LAYERS)
def test_first_order(name: str) -> None:
    function, values = case(name)
    directions = directions_of(values)
    expected = gradient(function, leaves(values))
    close(grad(function)(values), expected)
    close(jacrev(function)(values), expected)
    value, moved = jvp(function, (values,), (directions,))
    close((value, moved), (function(values), inner(expected, directions)))
    randomness = "same" if name in DRAWN else "error"
    close(jacfwd(function, randomness=randomness)(values), expected)


@pytest.mark.parametrize("name", [name for name in CHOOSING if name not in DRAWN])
def test_linearize(name: str) -> None:
    """Not of draws, which the result of torch.func.linearize makes again."""
    function, values = case(name)
    directions = directions_of(values)
    value, linear = linearize(function, values)
    expected = inner(gradient(function, leaves(values)), directions)
    close((value, linear(directions)), (function(values), expected))


@pytest.mark.parametrize("name", LAYERS)
def test_per_sample_gradients(name: str) -> None:
    """vmap(grad): each sample is a call of its own, with a choice and losses of its own."""
    function, values = case(name)
    samples = torch.randn(B, 1, S, H, dtype=F64)
    own = [gradient(function, leaves(values | {"x": x})) for x in samples]
    in_dims = ({name: 0 if name == "x" else None for name in values},)
    randomness = "same" if name in DRAWN else "error"
    found = vmap(grad(function), in_dims, randomness=randomness)(values | {"x": samples})
    close(found, pytree.tree_map(lambda *each: torch.stack(each), *own))


@pytest.mark.parametrize("name", LAYERS)
def test_second_order(name: str) -> None:
    function, values = case(name)
    directions = directions_of(values)
    expected = forward_over_reverse(function, values, directions)
    close(jvp(grad(function), (values,), (directions,))[1], expected)
    transposed = reverse_over_reverse(function, values, directions)
    close(grad(lambda values: inner(grad(function)(values), directions))(values), transposed)
    if name in DRAWN:
        return

    along = directions["x"]
    rows = hessian(lambda x: function(values | {"x": x}))(values["x"])
    only_x = {n: v if n == "x" else torch.zeros_like(v) for n, v in directions.items()}
    product = forward_over_reverse(function, values, only_x)["x"]
    close(torch.tensordot(rows, along, along.dim()), product)


# ---- what has no meaning there


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("transform", [jacfwd, hessian])
def test_draws_ask_for_randomness(name: str, transform: Callable[..., Any]) -> None:
    function, values = case(name)
    with pytest.raises(RuntimeError, match="randomness"):
        transform(function)(values)


def listed() -> ExpertList:
    return ExpertList(nn.Linear(H, H, dtype=F64) for _ in range(E))


@pytest.mark.parametrize("estimator", ["exact", "straight_through_dense"])
@pytest.mark.parametrize("outer", [lambda f: f, grad, lambda f: grad(grad_sum(f))])
def test_a_list_of_experts_refuses_ids_that_differ_by_sample(
    estimator: str, outer: Callable[[Function], Callable[[Values], object]]
) -> None:
    moe = make(experts=listed(), gate=Gate(estimator=estimator))
    function, values = layer_loss(moe), layer_values(moe, x=torch.randn(B, 1, S, H, dtype=F64))
    in_dims = ({name: 0 if name == "x" else None for name in values},)
    message = "ExpertList: indices must hold values that can be read back, got a batch of vmap"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        vmap(outer(function), in_dims)(values)


def grad_sum(function: Function) -> Function:
    return lambda values: inner(grad(function)(values), values)


def test_a_list_of_experts_under_a_batch_of_parameters() -> None:
    """Where the ids are one sample's, an ensemble of experts is a batch."""
    experts = listed()
    x, indices = torch.randn(S, H, dtype=F64), torch.rand(S, E).topk(K).indices
    weights = torch.rand(S, K, dtype=F64)
    several = {name: torch.randn(B, *p.shape, dtype=F64) for name, p in experts.named_parameters()}

    def function(values: Values) -> Tensor:
        call = torch.func.functional_call(experts, values, (x, indices, weights))
        return call.square().sum()

    each = [grad(function)({n: v[i] for n, v in several.items()}) for i in range(B)]
    found = vmap(grad(function))(several)
    close(found, pytree.tree_map(lambda *each: torch.stack(each), *each))


def test_an_attached_loss() -> None:
    """It has a gradient, and no tangent."""
    moe = make()
    layer = WithAttachedLoss(moe)
    values = layer_values(moe, x=torch.randn(S, H, dtype=F64))

    def attached(values: Values) -> Tensor:
        given = {f"moe.{name}": value for name, value in values.items() if name != "x"}
        return torch.func.functional_call(layer, given, (values["x"],)).square().sum()

    def added(values: Values) -> Tensor:
        given = {name: value for name, value in values.items() if name != "x"}
        output = torch.func.functional_call(moe, given, (values["x"],))
        return output.hidden_states.square().sum() + output.aux_loss

    close(grad(attached)(values), grad(added)(values))
    with pytest.raises(NotImplementedError, match=r"^attach_loss: forward-mode derivatives by"):
        jvp(attached, (values,), (directions_of(values),))
