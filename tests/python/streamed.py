"""Experts in memory beside the same ones offloaded, and calls of both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchmoe.nn import Experts
from torchmoe.offload import OffloadedExperts, offload
from torchmoe.offload.layout import stored_sizes
from torchmoe.offload.slots import SLOTS


def expert_bytes(experts: Experts) -> int:
    """Of one expert."""
    return sum(parameter.nbytes for parameter in experts.parameters()) // experts.num_experts


def slots_of(experts: Experts, num_slots: int) -> int:
    """A budget for so many residents, whatever else it must hold."""
    one, window = stored_sizes("slots_of", experts)
    kind = experts.down_proj.device.type
    return (num_slots + SLOTS["cpu" if kind == "meta" else kind].num_staged) * one + window


class Pair(NamedTuple):
    """The same experts twice."""

    resident: Experts
    offloaded: OffloadedExperts


def pair(
    hidden: int = 8,
    inner: int = 12,
    experts: int = 8,
    *,
    num_slots: int = 3,
    dtype: torch.dtype = torch.float32,
    activation: str = "swiglu",
    bias: bool = True,
    device: str = "cpu",
    **options: Any,
) -> Pair:
    """Experts and their offloaded copy with room for num_slots residents."""
    resident = Experts(hidden, inner, experts, activation=activation, bias=bias, dtype=dtype)
    resident.requires_grad_(False).to(device)
    budget = slots_of(resident, num_slots)
    offloaded = offload(copy.deepcopy(resident), budget=budget, **options)
    assert offloaded.num_slots == num_slots
    return Pair(resident, offloaded)


class Call(NamedTuple):
    """Arguments of experts, and the gradient that arrives at their output."""

    x: Tensor
    indices: Tensor
    weights: Tensor
    grad: Tensor


def drawn(
    experts: Experts | OffloadedExperts,
    tokens: int,
    top_k: int,
    *,
    weights: torch.dtype = torch.float32,
    ids: Tensor | None = None,
) -> Call:
    """A random call with repeated ids, and ids outside [0, E), on the experts' device."""
    like = experts.down_proj if isinstance(experts, Experts) else experts
    if ids is None:
        ids = torch.randint(-2, experts.num_experts + 2, (tokens, top_k))
    x, grad = (torch.randn(tokens, experts.hidden_size).to(like.dtype) for _ in range(2))
    call = Call(x, ids, torch.rand(ids.shape).to(weights), grad)
    return Call(*(tensor.to(like.device) for tensor in call))


def gradients(
    experts: Callable[[Tensor, Tensor, Tensor], Tensor],
    call: Call,
    *,
    x: bool = True,
    w: bool = True,
) -> list[Tensor]:
    """The output and the gradients of x and the weights."""
    given, weights = call.x.clone().requires_grad_(x), call.weights.clone().requires_grad_(w)
    y = experts(given, call.indices, weights)
    y.backward(call.grad)
    return [y.detach(), *(leaf.grad for leaf in (given, weights) if leaf.grad is not None)]


def assert_same(given: Pair, call: Call, **wanted: bool) -> None:
    """The same bits without a gradient, with one, and of the gradients."""
    expected = gradients(given.resident, call, **wanted)
    actual = gradients(given.offloaded, call, **wanted)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a, e)
    with torch.no_grad():
        assert torch.equal(given.offloaded(*call[:3]), expected[0])


class AtOnce:
    """Reads when it is asked: what is in memory then does not depend on time."""

    def submit(self, read: Callable[[], None]) -> Future[None]:
        """Reads."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        try:
            future.set_result(read())
        except OSError as error:
            future.set_exception(error)
        return future
