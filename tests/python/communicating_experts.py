"""Communicating experts of every kind, and the same in loops."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from torchmoe.nn import (
    ExpertCommunication,
    ExpertList,
    Experts,
    MoE,
    Router,
    known_estimators,
)
from torchmoe.nn.estimators.estimator import ExpertFunction
from torchmoe.nn.estimators.registry import build_estimator

H, INNER, E, K, T, SIZE, HEADS = 6, 7, 5, 3, 23, 8, 2
F64 = torch.float64
ALONE = [name for name in known_estimators() if build_estimator(name).takes_experts_alone]
TOGETHER = [name for name in known_estimators() if name not in ALONE]


def stacked(dtype: torch.dtype = F64) -> Experts:
    return Experts(H, INNER, E, bias=True, dtype=dtype)


def listed() -> ExpertList:
    return ExpertList(nn.Sequential(nn.Linear(H, H, dtype=F64), nn.Tanh()) for _ in range(E))


def scaled(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Experts that are a plain function: expert e multiplies by e + 1 and turns the entries."""
    routed = (indices >= 0) & (indices < E)
    factor = (weights * (indices + 1)).masked_fill(~routed, 0).sum(1, keepdim=True)
    return (factor * x.roll(1, dims=1)).to(x.dtype)


def talking(
    experts: ExpertFunction, dtype: torch.dtype = F64, **options: int
) -> ExpertCommunication:
    """A layer past its start, with differences between slots that a softmax notices."""
    options = {"size": SIZE, "num_heads": HEADS} | options
    layer = ExpertCommunication(experts, H, E, dtype=dtype, **options)
    with torch.no_grad():
        layer.qkv_proj.normal_()
        layer.out_proj.normal_()
    return layer


def ids(situation: str) -> Tensor:
    """Expert ids [T, K]."""
    if situation == "no_tokens":
        return torch.empty(0, K, dtype=torch.int64)
    chosen = torch.rand(T, E).argsort(dim=1)
    if situation == "top1":
        return chosen[:, :1].contiguous()
    if situation == "all_experts":
        return chosen
    chosen = chosen[:, :K].contiguous()
    if situation == "dropped":
        chosen[torch.rand(T, K) < 0.3] = -1
        chosen[0] = -1
        chosen[1] = torch.tensor([-1, 2, -1])
        chosen[2] = torch.tensor([-1, 2, 0])
    elif situation == "one_each":
        chosen[:, [0, 2]] = -1
    elif situation == "all_dropped":
        chosen.fill_(-1)
    elif situation == "repeated":
        chosen[:, 2] = chosen[:, 0]
        chosen[0] = 4
    elif situation == "out_of_range":
        chosen[0] = torch.tensor([E, 1, -7])
        chosen[1] = torch.tensor([torch.iinfo(torch.int64).max, 0, 3])
        chosen[2, 0] = torch.iinfo(torch.int64).min
    return chosen


SITUATIONS = (
    "plain",
    "dropped",
    "one_each",
    "all_dropped",
    "repeated",
    "out_of_range",
    "top1",
    "all_experts",
    "no_tokens",
)


def plain(layer: ExpertCommunication, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The layer as loops over tokens, slots and heads."""
    wide = layer.size // layer.num_heads
    y = 0 * (x + weights.sum())
    for t in range(x.shape[0]):
        slots = [j for j in range(indices.shape[1]) if 0 <= indices[t, j] < layer.num_experts]
        one = weights.new_ones(1, 1)
        outputs = {
            j: layer.experts(x[t : t + 1], indices[t : t + 1, j : j + 1], one)[0] for j in slots
        }
        row = torch.zeros_like(x[t])
        for j in slots:
            heard = torch.zeros_like(x[t])
            for head in range(layer.num_heads):
                part = slice(head * wide, (head + 1) * wide)
                q, k, v = (
                    {
                        i: projection[part] @ (o / (o.square().mean() + eps(x.dtype)).sqrt())
                        for i, o in outputs.items()
                    }
                    for projection in layer.qkv_proj.chunk(3)
                )
                scores = torch.stack([q[j] @ k[i] for i in slots]) / math.sqrt(wide)
                values = torch.stack([v[i] for i in slots])
                heard = heard + layer.out_proj[:, part] @ (scores.softmax(0) @ values)
            row = row + weights[t, j] * (outputs[j] + (heard if len(slots) > 1 else 0))
        y[t] = row
    return y


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def run(
    layer: Callable[[Tensor, Tensor, Tensor], Tensor],
    module: nn.Module,
    indices: Tensor,
    x: Tensor,
    weights: Tensor,
) -> dict[str, Tensor]:
    """The output and every gradient."""
    module.zero_grad()
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = layer(x, indices, weights)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad, **copy.deepcopy(found)}


def check_against_loops(layer: ExpertCommunication, indices: Tensor) -> None:
    x = torch.randn(indices.shape[0], H, dtype=F64)
    weights = torch.rand(indices.shape, dtype=F64)
    got = run(layer, layer, indices, x, weights)
    expected = run(lambda *args: plain(layer, *args), layer, indices, x, weights)
    for name, value in got.items():
        # What no loop reached has no gradient there and one of zeros here.
        assert_close(value, expected.get(name, torch.zeros_like(value)), msg=name)


def moe_of(experts: ExpertCommunication, **options: object) -> MoE:
    options = {"router": Router(H, E, dtype=F64), "dtype": F64} | options
    return MoE(H, None, E, K, experts=experts, **options)
