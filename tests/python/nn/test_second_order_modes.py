"""Second derivatives of a layer through checkpoints, and torch.func's transforms compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from plain_moe import gradients
from second_order import Function, Values, directions_of, gradient, reverse_over_reverse
from selectively import selectively
from torchmoe.nn import Capacity, Gate, MoE

T, H, INNER, E, K = 7, 6, 5, 4, 2
F64 = torch.float64
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
estimators = pytest.mark.parametrize(
    "estimator", ["exact", "straight_through_dense", "default_vector", "sparsemixer"]
)

Run = Callable[..., Any]


def make(estimator: str = "exact") -> MoE:
    return MoE(H, INNER, E, K, capacity=Capacity(1.1), gate=Gate(estimator=estimator), dtype=F64)


def loss_of(moe: MoE, run: Run | None = None) -> Function:
    """Of the layer, its call given to `run` if there is one."""

    def function(values: Values) -> Tensor:
        parameters = {name: value for name, value in values.items() if name != "x"}

        def call(x: Tensor) -> tuple[Tensor, Tensor]:
            output = functional_call(moe, parameters, (x,))
            return output.hidden_states, output.aux_loss

        torch.manual_seed(1)
        y, aux_loss = (call if run is None else partial(run, call))(values["x"])
        return y.square().sum() + aux_loss

    return function


def values_of(moe: MoE) -> Values:
    values = {name: p.detach() for name, p in moe.named_parameters()}
    return values | {"x": torch.randn(T, H, dtype=F64)}


# ---- checkpoints


@estimators
@pytest.mark.parametrize(
    "run", [partial(checkpoint, use_reentrant=False), selectively], ids=["whole", "selective"]
)
def test_double_backward_through_a_checkpoint(estimator: str, run: Run) -> None:
    moe = make(estimator)
    values = values_of(moe)
    directions = directions_of(values)
    expected = reverse_over_reverse(loss_of(moe), values, directions)
    found = reverse_over_reverse(loss_of(moe, run), values, directions)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@estimators
def test_a_graph_of_the_gradient_through_a_reentrant_checkpoint(estimator: str) -> None:
    """Such a checkpoint's gradient has no graph, as torch has it; the gradient is the same."""
    moe = make(estimator)
    x = torch.randn(T, H, dtype=F64)
    seen = []
    for create_graph in (False, True):
        moe.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        y, aux_loss, _ = checkpoint(moe, leaf, use_reentrant=True)
        loss = y.square().sum() + aux_loss
        with warnings.catch_warnings():  # once in a process, of a cycle that leaves end here
            warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
            loss.backward(create_graph=create_graph)
        seen.append([leaf.grad, *gradients(moe).values()])
    for plain, other in zip(*seen, strict=True):
        assert torch.equal(plain, other)


# ---- compilers

TRANSFORMS: dict[str, Callable[[Function, Values, Values], object]] = {
    "grad": lambda f, v, d: grad(f)(v),
    "vmap_of_grad": lambda f, v, d: vmap(
        grad(f), ({name: 0 if name == "x" else None for name in v},)
    )(v | {"x": torch.stack([v["x"], d["x"]])}),
    "jvp": lambda f, v, d: jvp(f, (v,), (d,)),
}


def unseeded(moe: MoE) -> Function:
    """Without what a compiler breaks its graph at."""

    def function(values: Values) -> Tensor:
        parameters = {name: value for name, value in values.items() if name != "x"}
        output = functional_call(moe, parameters, (values["x"],))
        return output.hidden_states.square().sum() + output.aux_loss

    return function


@pytest.mark.parametrize("name", TRANSFORMS)
def test_compiled_transforms(name: str) -> None:
    moe = make()
    function, values = unseeded(moe), values_of(moe)
    directions = directions_of(values)
    transform = TRANSFORMS[name]
    compiled = torch.compile(
        lambda v, d: transform(function, v, d), backend="aot_eager", fullgraph=True
    )
    close(compiled(values, directions), transform(function, values, directions))


@pytest.mark.parametrize("name", ["grad", "jvp"])
def test_transforms_of_a_compiled_layer(name: str) -> None:
    moe = make()
    values = values_of(moe)
    directions = directions_of(values)
    function = unseeded(moe)
    compiled = torch.compile(function, backend="aot_eager")
    transform = TRANSFORMS[name]
    close(transform(compiled, values, directions), transform(function, values, directions))


@pytest.mark.parametrize("estimator", ["exact", "straight_through_dense"])
def test_double_backward_of_what_dynamo_traced(estimator: str) -> None:
    """What AOTAutograd makes of it has a first gradient alone: torch refuses another."""
    moe = make(estimator)
    function, values = unseeded(moe), values_of(moe)
    directions = directions_of(values)
    traced = torch.compile(function, backend="eager", fullgraph=True)
    expected = reverse_over_reverse(function, values, directions)
    close(reverse_over_reverse(traced, values, directions), expected)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    close(gradient(compiled, leaves), gradient(function, leaves))
