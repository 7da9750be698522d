"""The check of first derivatives finds what is planted, says where, and accuses nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchmoe.testing._derivatives import Derivatives, check_derivatives

T, H, INNER, E, K = 9, 6, 5, 4, 2
F64 = torch.float64


Function = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def tensors() -> dict[str, Tensor]:
    return {
        "x": torch.randn(T, H, dtype=F64),
        "router": torch.randn(E, H, dtype=F64),
        "w_in": torch.randn(E, INNER, H, dtype=F64),
        "w_out": torch.randn(E, H, INNER, dtype=F64),
    }


def layer(
    *,
    router_type: torch.dtype = F64,
    activation: Callable[[Tensor], Tensor] = nn.functional.silu,
    **hooks: Callable[[Tensor], Tensor],
) -> Function:
    """A plain layer; a hook stands between a tensor and its use."""

    def f(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        p = {name: hooks.get(name, nn.Identity())(tensor) for name, tensor in given.items()}
        probs = (p["x"] @ p["router"].T).to(router_type).softmax(-1)
        top, ids = probs.topk(K, dim=-1)
        weights = (top / top.sum(-1, keepdim=True)).to(F64)
        inner = activation(torch.einsum("tkih,th->tki", p["w_in"][ids], p["x"]))
        y = torch.einsum("tkhi,tki,tk->th", p["w_out"][ids], inner, weights)
        return {"y": y, "loss": 0.01 * probs.mean(0).square().sum()}

    return f


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is multiplied by `factor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scaled(factor: Tensor | float) -> Callable[[Tensor], Tensor]:
    return lambda x: Scaled.apply(x, torch.as_tensor(factor, dtype=F64))


def one_row(shape: tuple[int, ...], row: tuple[int, ...], factor: float) -> Tensor:
    factors = torch.ones(shape, dtype=F64)
    factors[row] = factor
    return factors


class WrongSlope(torch.autograd.Function):
    """SiLU with a derivative that is off by 3e-4."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return nn.functional.silu(u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        s = u.sigmoid()
        return grad * (s * (1 + u * (1 - s)) + 3e-4)


class ReadsFlat(torch.autograd.Function):
    """The identity, with a backward pass that takes memory for a contiguous gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.as_strided(grad.shape, torch.empty(grad.shape).stride())


def check(f: Function, seed: int = 0, **options: Any) -> Derivatives:
    few = {"directions": 2, "blocks": 2, "entries": 2}
    return check_derivatives(f, tensors(), seed=seed, **few | options)


@pytest.mark.parametrize("router_type", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [nn.functional.silu, torch.relu, torch.tanh])
def test_accuses_nothing(router_type: torch.dtype, activation: Callable[[Tensor], Tensor]) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        result = check(layer(router_type=router_type, activation=activation), seed)
        assert result.disagreements == []
        assert result.dtype_eps == torch.finfo(router_type).eps
        assert result.outputs == ["y", "loss"]


@pytest.mark.parametrize("router_type", [F64, torch.float32])
@pytest.mark.parametrize(
    ("hooks", "name", "prefix"),
    [
        ({"router": scaled(0.5)}, "router", ()),
        ({"router": scaled(1.001)}, "router", ()),
        ({"router": torch.Tensor.detach}, "router", ()),
        ({"w_in": scaled(one_row((E, INNER, H), (2, 3), 0.9))}, "w_in", (2, 3)),
        ({"w_out": scaled(one_row((E, H, INNER), (1, 5, 0), 2.0))}, "w_out", (1, 5, 0)),
        ({"x": scaled(one_row((T, H), (7,), 0.0))}, "x", (7,)),
        ({"x": scaled(-1.0)}, "x", ()),
    ],
)
def test_finds_a_planted_error_and_its_entry(
    hooks: dict[str, Callable[[Tensor], Tensor]],
    name: str,
    prefix: tuple[int, ...],
    router_type: torch.dtype,
) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        found = check(layer(router_type=router_type, **hooks), seed).disagreements
        assert {d.name for d in found} == {name}
        for d in found:
            assert len(d.entry) == tensors()[name].dim()
            assert d.entry[: len(prefix)] == prefix
            assert abs(d.expected - d.got) > d.bound
