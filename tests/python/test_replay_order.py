"""Which call is recomputed: gradients as without checkpoints, in any order of backward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

from checkpointed_models import (
    CHECKPOINTED,
    KINDS,
    ORDERS,
    STRUCTURES,
    Model,
    Wrap,
    assert_same,
    backward,
    differ,
    micro_batches,
    nested,
    run,
    twice,
    unbroken,
    wrap_of,
)
from torchmoe import RoutingReplay

pytestmark = [
    # Of a reentrant checkpoint in another one, whose forward pass keeps no graph.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
    # The gradients of one model are compared, hundreds of times.
    pytest.mark.filterwarnings("ignore:MoE. update must be called once:UserWarning"),
]


# ---- the order of the backward passes


@pytest.mark.parametrize("forward_too", [False, True], ids=["recorded", "forced"])
@pytest.mark.parametrize(
    ("outer", "inner", "structure"),
    CHECKPOINTED,
    ids=lambda value: getattr(value, "__name__", value),
)
def test_micro_batches_in_every_order(
    outer: str, inner: str, structure: Callable[..., Tensor], forward_too: bool
) -> None:
    model, batches = Model(), micro_batches(equal=True)
    wraps = wrap_of(outer), wrap_of(inner)
    replay = RoutingReplay(model)
    for order in ORDERS:
        expected = unbroken(model, structure, batches, order, (outer, inner))
        with replay.record():
            losses = run(model, structure, batches, wraps)
        if forward_too:
            with replay.force():
                losses = run(model, structure, batches, wraps, seed=5)
                actual = backward(model, losses, batches, order)
        else:
            with replay.force():
                actual = backward(model, losses, batches, order)
        assert_same(actual, expected)
    # What was to be overruled: the generator makes other choices by then.
    losses = run(model, structure, batches, wraps)
    assert differ(backward(model, losses, batches, ORDERS[0]), expected)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_inputs_routed_by_noise(kind: str, structure: Callable[..., Tensor]) -> None:
    """The weights are noisy too, so that the checkpoints replay the noise, and only the ids of
    another micro-batch could be wrong."""
    model, batches = Model(logit_noise=1.0), micro_batches(equal=True)
    wraps = (wrap_of(kind, preserve_rng_state=True),) * 2
    replay = RoutingReplay(model)
    for order in ORDERS:
        expected = unbroken(model, structure, batches, order, (kind, kind))
        with replay.record():
            losses = run(model, structure, batches, wraps)
        calls = replay.decisions["first.moe"]
        chosen = [selected for selected, _ in calls[:: len(calls) // 3]]
        assert all(not torch.equal(*pair) for pair in combinations(chosen, 2))
        with replay.force():
            assert_same(backward(model, losses, batches, order), expected)


# ---- one backward pass after another


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_backward_passes(kind: str, structure: Callable[..., Tensor]) -> None:
    model, batches = Model(), micro_batches()
    replay = RoutingReplay(model)

    order = (1, 0, 2, 1, 2, 0)
    expected = unbroken(model, structure, batches, order, (kind, kind))
    with replay.record():
        losses = run(model, structure, batches, (wrap_of(kind),) * 2)
    with replay.force():
        assert_same(backward(model, losses, batches, order), expected)


def test_force_entered_anew_for_each_backward_pass() -> None:
    model, batches = Model(), micro_batches()
    replay = RoutingReplay(model)
    expected = backward(model, run(model, twice, batches), batches, (1, 2, 0))
    with replay.record():
        run(model, twice, batches)
    with replay.force():
        losses = run(model, twice, batches, (wrap_of(KINDS[1]),) * 2, seed=5)
    for parameter in (*model.parameters(), *batches):
        parameter.grad = None
    for i in (1, 2, 0):
        with replay.force():
            losses[i].backward()
    assert_same([p.grad for p in (*model.parameters(), *batches)], expected)


def test_every_recording_keeps_to_its_graph() -> None:
    """A second recording forgets the first one's decisions, but not what its graph needs."""
    model, batches = Model(), micro_batches()
    replay = RoutingReplay(model)
    expected = backward(model, run(model, nested, batches), batches, (0, 2, 1))
    wraps = (wrap_of(KINDS[1]),) * 2
    losses = []
    torch.manual_seed(0)
    for x in batches:
        with replay.record():
            losses.append(nested(model, x, *wraps).square().sum())
    with replay.force():
        assert_same(backward(model, losses, batches, (0, 2, 1)), expected)


# ---- how a recomputation runs


@pytest.mark.parametrize("early_stop", [True, False])
def test_a_recomputation_that_stops_early(early_stop: bool) -> None:
    """Behind the last saved tensor lies one call more, which is then recomputed or not."""
    model, batches = Model(), micro_batches()
    replay = RoutingReplay(model)

    def structure(model: Model, x: Tensor, outer: Wrap, inner: Wrap) -> Tensor:
        def tail(z: Tensor) -> Tensor:
            z = inner(model.first, model.second(z))
            with torch.no_grad():
                model.first(z)
            return z

        return outer(tail, model.first(outer(tail, x)))

    expected = backward(model, run(model, structure, batches), batches, (1, 0, 2))
    with replay.record(), set_checkpoint_early_stop(early_stop):
        losses = run(model, structure, batches, (wrap_of(KINDS[1]),) * 2)
    with replay.force():
        assert_same(backward(model, losses, batches, (1, 0, 2)), expected)


def test_saved_tensors_looked_at_outside_of_backward() -> None:
    """Torch recomputes for that too, each time again."""
    model, batches = Model(), micro_batches()
    replay = RoutingReplay(model)
    expected = backward(model, run(model, twice, batches), batches, (2, 1, 0))
    with replay.record():
        losses = run(model, twice, batches, (wrap_of(KINDS[1]),) * 2)
        tanh = losses[0].grad_fn.next_functions[0][0].next_functions[0][0]
        recorded = len(replay.decisions["first.moe"])
        values = [tanh._saved_result]
        assert len(replay.decisions["first.moe"]) == recorded == 6
    with replay.force():
        values += [tanh._saved_result for _ in range(2)]
        assert torch.equal(values[1], values[2])
        assert not torch.equal(values[0], values[1])
        assert_same(backward(model, losses, batches, (2, 1, 0)), expected)


@contextmanager
def saved_elsewhere() -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        yield


@pytest.mark.parametrize("inside", [saved_elsewhere, torch.autograd.graph.save_on_cpu])
def test_other_hooks_of_saved_tensors(inside: Callable[[], Any]) -> None:
    model, batches = Model(), micro_batches()
    replay = RoutingReplay(model)

    def structure(model: Model, x: Tensor, outer: Wrap, inner: Wrap) -> Tensor:
        def hooked(z: Tensor) -> Tensor:
            with inside():
                z = model.first(z)
            return torch.tanh(model.second(z))

        return outer(hooked, x)

    expected = backward(model, run(model, structure, batches), batches, (1, 0, 2))
    with replay.record():
        losses = run(model, structure, batches, (wrap_of(KINDS[1]),) * 2)
    with replay.force():
        assert_same(backward(model, losses, batches, (1, 0, 2)), expected)


@pytest.mark.parametrize("inner", KINDS)
def test_a_backward_pass_inside_of_a_checkpoint(inner: str) -> None:
    """As where a loss is formed of a gradient."""
    model, batches = Model(), micro_batches()
    replay = RoutingReplay(model)

    def structure(model: Model, x: Tensor, outer: Wrap, wrapped: Wrap) -> Tensor:
        def penalised(z: Tensor) -> Tensor:
            z = model.first(z)
            leaf = z.detach().requires_grad_()
            with torch.enable_grad():
                wrapped(model.first, wrapped(model.second, leaf)).sum().backward()
            return model.second(model.first(z) + leaf.grad)

        return outer(penalised, x)

    wraps = wrap_of(KINDS[1]), wrap_of(inner)
    expected = backward_of_inputs(run(model, structure, batches), batches)
    with replay.record():
        run(model, structure, batches)
    with replay.force():
        # The inner backward pass recomputes the outer checkpoint before its forward pass ends.
        losses = run(model, structure, batches, wraps, seed=5)
        assert_same(backward_of_inputs(losses, batches), expected)


def backward_of_inputs(losses: list[Tensor], batches: list[Tensor]) -> list[Tensor]:
    """The parameters' gradients have those of the inner backward passes in them."""
    found = []
    for i in (1, 0, 2):
        batches[i].grad = None
        losses[i].backward()
        found.append(batches[i].grad.clone())
    return [*found, losses[0].detach()]


class Recomputed(torch.autograd.Function):
    """A checkpoint as other libraries write it."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        [x] = ctx.saved_tensors
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(leaf)
        torch.autograd.backward(y, dy)
        return None, leaf.grad


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_checkpoint_of_another_library(structure: Callable[..., Tensor]) -> None:
    model, batches = Model(), micro_batches()
    replay = RoutingReplay(model)
    for order in ORDERS[::2]:
        expected = unbroken(model, structure, batches, order, KINDS)
        with replay.record():
            losses = run(model, structure, batches, (Recomputed.apply, wrap_of(KINDS[1])))
        with replay.force():
            assert_same(backward(model, losses, batches, order), expected)


# Where a graph is broken, torch's own tracing looks at .grad of what the first half computed.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model(kind: str) -> None:
    model, batches = Model(), micro_batches()
    replay = RoutingReplay(model)
    wraps = (wrap_of(kind),) * 2
    compiled = torch.compile(lambda x: twice(model, x, *wraps).square().sum(), backend="aot_eager")
    for order in ORDERS[::2]:
        expected = backward(model, run(model, twice, batches), batches, order)
        torch.manual_seed(0)
        with replay.record():
            losses = [compiled(x) for x in batches]
        with replay.force():
            assert_same(backward(model, losses, batches, order), expected)
