"""Models with checkpoints in every arrangement."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import permutations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from op_case import C, assert_close
from replayed import H, T, random_layer
from torchmoe.nn import Gate, MoE

Wrap = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
KINDS = ("reentrant", "without reentry")
ORDERS = tuple(permutations(range(3)))
EPS = torch.finfo(torch.float32).eps


def plainly(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def wrap_of(kind: str, *, preserve_rng_state: bool = False) -> Wrap:
    """A checkpoint that by default leaves the generator as it is when backward runs."""
    reentrant = kind == "reentrant"
    return partial(checkpoint, use_reentrant=reentrant, preserve_rng_state=preserve_rng_state)


class Block(nn.Module):
    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        output = self.moe(x)
        # What tanh saves is recomputed last, so that recomputation runs through the whole layer.
        return torch.tanh(x + output.hidden_states + 0.1 * output.aux_loss)


class Model(nn.Module):
    """Two layers, whose ids are drawn while their weights are not, unless there is noise."""

    def __init__(self, logit_noise: float = 0.0) -> None:
        super().__init__()
        options = {"logit_noise": logit_noise} if logit_noise else {}
        if logit_noise:
            options |= {"gate": Gate(), "capacity": None}
        self.first, self.second = (Block(random_layer(**options)) for _ in range(2))


def each(model: Model, x: Tensor, outer: Wrap, inner: Wrap) -> Tensor:
    return outer(model.second, inner(model.first, x))


def together(model: Model, x: Tensor, outer: Wrap, inner: Wrap) -> Tensor:
    return outer(lambda z: model.second(model.first(z)), x)


def twice(model: Model, x: Tensor, outer: Wrap, inner: Wrap) -> Tensor:
    return outer(lambda z: model.first(model.second(model.first(z))), x)


def tied(model: Model, x: Tensor, outer: Wrap, inner: Wrap) -> Tensor:
    return outer(model.first, outer(model.second, inner(model.first, x)))


def nested(model: Model, x: Tensor, outer: Wrap, inner: Wrap) -> Tensor:
    def both(z: Tensor) -> Tensor:
        return inner(model.first, model.second(inner(model.first, z)))

    return outer(both, outer(both, x))


def thrice_nested(model: Model, x: Tensor, outer: Wrap, inner: Wrap) -> Tensor:
    def innermost(z: Tensor) -> Tensor:
        return model.first(outer(lambda z: model.second(model.first(z)), z))

    return outer(lambda z: model.second(inner(innermost, model.first(inner(innermost, z)))), x)


STRUCTURES = (each, together, twice, tied, nested, thrice_nested)
CHECKPOINTED = [
    (outer, inner, structure)
    for outer in KINDS
    for inner in KINDS
    for structure in STRUCTURES
    if outer == inner or "nested" in structure.__name__
]


def run(
    model: Model,
    structure: Callable[..., Tensor],
    batches: list[Tensor],
    wraps: tuple[Wrap, Wrap] = (plainly, plainly),
    seed: int = 0,
) -> list[Tensor]:
    """The losses of the micro-batches, each with draws of its own."""
    torch.manual_seed(seed)
    return [structure(model, x, *wraps).square().sum() for x in batches]


def backward(
    model: Model, losses: list[Tensor], batches: list[Tensor], order: tuple[int, ...]
) -> list[Tensor]:
    """The gradients of parameters and inputs, accumulated in that order."""
    model.zero_grad()
    for x in batches:
        x.grad = None
    torch.manual_seed(99)
    for place, i in enumerate(order):
        losses[i].backward(retain_graph=i in order[place + 1 :])
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return found + [x.grad.clone() for x in batches]


def unbroken(
    model: Model,
    structure: Callable[..., Tensor],
    batches: list[Tensor],
    order: tuple[int, ...],
    kinds: tuple[str, str],
) -> list[Tensor]:
    """The gradients of a run without replay whose checkpoints bring the generator back.

    A reentrant checkpoint adds up the gradients of a layer that is called in several in another
    order than a run without checkpoints, to which the result is compared here.
    """
    plain = backward(model, run(model, structure, batches), batches, order)
    wraps = tuple(wrap_of(kind, preserve_rng_state=True) for kind in kinds)
    found = backward(model, run(model, structure, batches, wraps), batches, order)
    if KINDS[0] not in kinds:
        assert_same(found, plain)
    for one, other in zip(found, plain, strict=True):
        # Each is a sum of at most 3 micro-batches with 6 calls.
        assert_close(one, other, C * 18 * EPS * other.abs().max().item())
    return found


def micro_batches(*, equal: bool = False) -> list[Tensor]:
    """Three that a pipeline may take back in any order."""
    first = torch.randn(T, H)
    return [(first if equal else torch.randn(T, H)).clone().requires_grad_() for _ in range(3)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected) > 3
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def differ(some: list[Tensor], others: list[Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(some, others, strict=True))
