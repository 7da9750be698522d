"""Batch invariance: a token's numbers do not depend on the tokens and experts that come along."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchmoe
from torchmoe.ops import dispatch_plan, grouped_linear, router_logits

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
H, INNER, E, K = 70, 150, 24, 2  # no multiples of what the kernels hold at a time
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 13, 30, 257, 300]  # of batches out of T tokens
T = 600


def drawn(*sizes: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64).mul(0.3).to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class Experts:
    """Parameters, tokens and a choice of experts of which one has half of all slots."""

    def __init__(self, dtype: torch.dtype, activation: str, bias: bool) -> None:
        torch.manual_seed(0)
        width = INNER if activation == "gelu" else 2 * INNER
        self.activation = activation
        self.parameters: dict[str, Tensor | None] = {
            "w_in": drawn(E, width, H, dtype=dtype),
            "b_in": drawn(E, width, dtype=dtype) if bias else None,
            "w_out": drawn(E, H, INNER, dtype=dtype),
            "b_out": drawn(E, H, dtype=dtype) if bias else None,
        }
        self.x = drawn(T, H, dtype=dtype)
        self.grad = drawn(T, H, dtype=dtype)
        self.weights = torch.rand(T, K, dtype=wide(dtype))
        self.indices = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
        self.indices[: T // 2, 0] = 5
        self.indices[: T // 2, 1] = torch.randint(6, E, (T // 2,))

    def run(self, tokens: Tensor, experts: Tensor | None = None) -> dict[str, Tensor]:
        """The output and every gradient of a layer that has these experts (all) alone."""
        experts = torch.arange(E) if experts is None else experts
        local = torch.full((E,), -1)
        local[experts] = torch.arange(len(experts))
        given: dict[str, Any] = {
            name: None if value is None else value[experts].clone().requires_grad_()
            for name, value in self.parameters.items()
        }
        x = self.x[tokens].clone().requires_grad_()
        weights = self.weights[tokens].clone().requires_grad_()
        y = torchmoe.ops.expert_mlp(
            x, local[self.indices[tokens]], weights, **given, activation=self.activation
        )
        y.backward(self.grad[tokens])
        leaves = {"x": x, "weights": weights, **given}
        grads = {f"grad_{name}": leaf.grad for name, leaf in leaves.items() if leaf is not None}
        return {"y": y.detach(), **{name: grad for name, grad in grads.items() if grad is not None}}


BY_TOKEN = ("y", "grad_x", "grad_weights")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_of_a_layer(dtype: torch.dtype, activation: str, bias: bool) -> None:
    layer = Experts(dtype, activation, bias)
    whole = layer.run(torch.arange(T))
    for size in SIZES:
        tokens = torch.randperm(T)[:size]
        part = layer.run(tokens)
        for name in BY_TOKEN:
            assert torch.equal(part[name], whole[name][tokens]), (name, size)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_of_a_layer(dtype: torch.dtype, activation: str, bias: bool) -> None:
    layer = Experts(dtype, activation, bias)
    tokens = torch.arange(T)
    whole = layer.run(tokens)
    for size in (1, 2, 5, 16):
        experts = torch.cat([torch.tensor([5]), 6 + torch.randperm(E - 6)[: size - 1]])
        part = layer.run(tokens, experts)
        for name, grad in part.items():
            if name not in BY_TOKEN:
                assert torch.equal(grad, whole[name][experts]), (name, size)
        here = torch.isin(layer.indices, experts)
        assert torch.equal(part["grad_weights"], torch.where(here, whole["grad_weights"], 0))
        all_here = here.all(1)
        for name in ("y", "grad_x"):
            assert torch.equal(part[name][all_here], whole[name][all_here]), (name, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.cpu_only
def test_tokens_of_a_router(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = (drawn(*sizes, dtype=dtype) for sizes in ((T, H), (E, H), (E,)))
    grad = torch.randn(T, E, dtype=wide(dtype))

    def run(tokens: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        given = x[tokens].clone().requires_grad_()
        logits = router_logits(given, weight[experts], bias[experts])
        logits.backward(grad[tokens][:, experts])
        assert given.grad is not None
        return logits.detach(), given.grad

    every = torch.arange(E)
    logits, grad_x = run(torch.arange(T), every)
    for size in SIZES:
        tokens = torch.randperm(T)[:size]
        some, some_grad = run(tokens, every)
        assert torch.equal(some, logits[tokens]), size
        assert torch.equal(some_grad, grad_x[tokens]), size
    for size in (1, 3, 8, 17):
        experts = torch.randperm(E)[:size]
        assert torch.equal(run(torch.arange(T), experts)[0], logits[:, experts]), size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_an_expert(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, weight = drawn(T, H, dtype=dtype), drawn(1, INNER, H, dtype=dtype)
    whole = grouped_linear(rows, weight, None, torch.tensor([0, T]))
    for size in SIZES:
        some = torch.randperm(T)[:size]
        part = grouped_linear(rows[some], weight, None, torch.tensor([0, size]))
        assert torch.equal(part, whole[some]), size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_of_many_blocks(dtype: torch.dtype) -> None:
    """One expert's rows, and each matrix, fill several of the kernels' blocks."""
    torch.manual_seed(0)
    tokens, hidden, inner = 1100, 520, 530
    x, grad = (drawn(tokens, hidden, dtype=dtype) for _ in range(2))
    w_in = drawn(2, inner, hidden, dtype=dtype)
    w_out = drawn(2, hidden, inner, dtype=dtype)
    indices = torch.zeros(tokens, 1, dtype=torch.int64)
    indices[1050:] = 1
    weights = torch.rand(tokens, 1, dtype=wide(dtype))

    def run(some: Tensor, experts: slice) -> list[Tensor]:
        plan = dispatch_plan(indices[some] - experts.start, experts.stop - experts.start)
        assert plan.expert_offsets[-1] == len(some)
        leaves = [t.clone().requires_grad_() for t in (x[some], weights[some])]
        leaves += [t[experts].clone().requires_grad_() for t in (w_in, w_out)]
        y = torchmoe.ops.expert_mlp(
            leaves[0], indices[some] - experts.start, leaves[1], leaves[2], None, leaves[3], None,
            activation="silu",
        )  # fmt: skip
        return [y.detach(), *torch.autograd.grad(y, leaves, grad[some])]

    whole = run(torch.arange(tokens), slice(0, 2))
    alone = run(torch.arange(1050, tokens), slice(1, 2))
    for part, all_of_it in zip(alone[:3], whole[:3], strict=True):
        assert torch.equal(part, all_of_it[1050:])
    for part, all_of_it in zip(alone[3:], whole[3:], strict=True):
        assert torch.equal(part, all_of_it[1:])
    some = torch.cat([torch.randperm(1050)[:700], torch.arange(1050, tokens)])
    for part, all_of_it in zip(run(some, slice(0, 2))[:3], whole[:3], strict=True):
        assert torch.equal(part, all_of_it[some])
