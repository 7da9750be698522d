"""Tokens and slots that are not routed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from torchmoe.testing.certify.copies import buffers
from torchmoe.testing.certify.finite_differences import against_differences
from torchmoe.testing.certify.law import ALL_OF_IT, Answer, Difference, Gap, Law, Note, differences
from torchmoe.testing.certify.subject import Step, Subject

_LEAKS = "A masked token goes through the router, the experts, the counts or a mean."


def ask(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """Masked tokens where the layer takes a mask, dropped slots where it has a capacity."""
    if subject.mask is not None:
        yield from _masked_tokens(subject, num_tokens)
    capacity = _capacity(subject, max(num_tokens, 8))
    if capacity is not None:
        yield from _dropped_tokens(subject, max(num_tokens, 8), capacity)
    elif subject.mask is None:
        counts = subject.sharing is not None and not subject.sharing.values
        why = (
            "tokens are counted, but no attribute capacity_factor or expert_capacity is seen"
            if counts
            else "the layer takes no mask and drops nothing, as far as is seen"
        )
        yield Gap(ALL_OF_IT, why)


def _masked_tokens(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    x = subject.tokens(num_tokens)
    flat = torch.arange(num_tokens) % 3 != (0 if num_tokens > 1 else 1)
    mask = flat.reshape(x.shape[:-1])
    step = subject.step(subject.steady(), x, mask=mask)

    if subject.surrogate is None:
        yield from against_differences(
            "finite differences with a mask",
            subject.function(subject.steady(), mask),
            lambda stream: subject.point(subject.fresh(), subject.tokens(num_tokens, stream)),
            subject.outputs(training=not subject.draws),
            subject.role,
            subject.seed,
        )

    # The values of a masked token do not matter.
    other = torch.where(mask.unsqueeze(-1), x, subject.tokens(num_tokens, stream=5))
    moved = subject.step(subject.steady(), other, mask=mask)
    gone = "what a masked token holds changes nothing"
    yield from differences(
        gone, _counted(step, flat), _counted(moved, flat), subject.tolerance, _LEAKS
    )
    unset = subject.step(subject.steady(), x.masked_fill(~mask.unsqueeze(-1), torch.nan), mask=mask)
    if any(value is not None and bool(value.isnan().any()) for value in unset.everything.values()):
        yield Note("NaN in a masked token spreads: it is multiplied by 0, not left out")

    # Its output is 0, or itself where the layer adds its input, and so is its gradient.
    y, grad = _rows(step.reading.hidden_states), step.gradients["x"]
    masked = {"y": y[~flat]}
    kept = {"y": _rows(x)[~flat]}
    residual = not any(differences("", kept, masked, subject.tolerance))
    if not residual:
        zero = {"y": torch.zeros_like(masked["y"])}
        yield from differences(
            "a masked token's output is 0", zero, masked, subject.tolerance, _LEAKS
        )
    if grad is not None and not residual:
        got = {"d/d x": _rows(grad)[~flat]}
        zero = {"d/d x": torch.zeros_like(got["d/d x"])}
        if bool((got["d/d x"] != 0).any()):
            yield from differences("a masked token's gradient is exactly 0", zero, got, 0.0, _LEAKS)

    # The others are as if it were not there.
    layer = subject.steady()
    alone = subject.step(
        layer,
        subject.shaped(_rows(x)[flat]),
        incoming=subject.shaped(_rows(subject.incoming(step.reading.hidden_states))[flat]),
    )
    clause = "the others are as without the masked tokens"
    expected = _counted(alone, torch.ones(int(flat.sum()), dtype=torch.bool))
    yield from differences(clause, expected, _counted(step, flat), subject.tolerance, _LEAKS)
    masked_layer = subject.steady()
    subject.step(masked_layer, x, mask=mask)
    plain = {f"buffer {name}": value for name, value in buffers(layer).items()}
    counted = {f"buffer {name}": value for name, value in buffers(masked_layer).items()}
    yield from differences(
        "masked tokens are not counted", plain, counted, subject.tolerance, _LEAKS
    )


def _dropped_tokens(subject: Subject, num_tokens: int, capacity: int) -> Iterator[Answer]:
    """T equal tokens ask for the same experts, each of which takes at most its capacity."""
    if capacity >= num_tokens:
        yield Gap("dropped tokens", "its capacity is too large for T tokens to exceed it")
        return
    one = subject.tokens(1)
    x = one.expand(*one.shape[:-2], num_tokens, -1).contiguous()
    step = subject.step(subject.fresh(), x, aux=0.0)
    y, grad = _rows(step.reading.hidden_states), step.gradients["x"]
    if not bool(y.any()):
        yield Gap("dropped tokens", "the experts' output for the token is 0, dropped or not")
        return
    if not subject.draws and bool(((y - y[0]).abs() <= subject.tolerance * y.abs().max()).all()):
        yield Difference(
            "a capacity binds",
            "y",
            f"at most {capacity} of {num_tokens} equal tokens served by an expert",
            "all of them",
            "The capacity is larger than its factor says, or is never compared with a position.",
        )
    idle = (y == 0).all(dim=-1)
    # A surrogate may teach the router from slots that are dropped.
    if subject.surrogate is None and grad is not None and bool(idle.any()):
        got = {"d/d x": _rows(grad)[idle]}
        zero = {"d/d x": torch.zeros_like(got["d/d x"])}
        clause = "a dropped token's gradient is exactly 0"
        yield from differences(clause, zero, got, 0.0, "A dropped slot still has a way back.")


def _counted(step: Step, flat: Tensor) -> dict[str, Tensor | None]:
    """What must not depend on masked tokens, those of x and y without them."""
    everything = dict(step.everything)
    for name in ("y", "d/d x"):
        value = everything[name]
        everything[name] = None if value is None else _rows(value)[flat]
    return everything


def _rows(value: Tensor) -> Tensor:
    return value.flatten(0, -2)


def _capacity(subject: Subject, num_tokens: int) -> int | None:
    """How many slots an expert takes: its own number, or ceil(c K T / E)."""
    for module in subject.fresh().modules():
        whole = getattr(module, "expert_capacity", None)
        if isinstance(whole, int) and whole > 0:
            return whole
        factor = getattr(module, "capacity_factor", None)
        if factor is None:
            factor = getattr(getattr(module, "capacity", None), "factor", None)
        if isinstance(factor, int | float) and factor > 0 and subject.num_experts is not None:
            return math.ceil(factor * (subject.top_k or 1) * num_tokens / subject.num_experts)
    return None


LAW = Law(
    name="unrouted_tokens",
    formula="a slot without an expert: no output, gradient exactly 0, all others as without it",
    means=(
        "A slot that has no expert is computed, counted or differentiated after all, often because "
        "its id is used as an index."
    ),
    ask=ask,
)
