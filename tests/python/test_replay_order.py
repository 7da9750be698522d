"""Which call is recomputed: gradients as without checkpoints, in any order of backward passes."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from copies import by_pickle
from op_case import C, assert_close
from replayed import H, T, random_layer
from torchmoe import RoutingReplay
from torchmoe.nn import Gate, MoE

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Of a reentrant checkpoint in another one, whose forward pass keeps no graph.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
    # The gradients of one model are compared, hundreds of times.
    pytest.mark.filterwarnings("ignore:MoE. update must be called once:UserWarning"),
]

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
    """Torch recomputes for that too, each time anew."""
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


# ---- where nothing is known of the forward pass


def test_decisions_from_elsewhere_are_taken_last_in_first_out() -> None:
    model, batches = Model(), micro_batches()
    source = RoutingReplay(model)
    with source.record():
        expected = backward(model, run(model, each, batches), batches, (2, 1, 0))
    decisions = source.decisions
    losses = run(model, each, batches, (wrap_of(KINDS[1]),) * 2, seed=0)
    with RoutingReplay(model, decisions).force():
        assert_same(backward(model, losses, batches, (2, 1, 0)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_two_calls_from_elsewhere_in_one_checkpoint_are_refused(kind: str) -> None:
    model, batches = Model(), micro_batches()
    source = RoutingReplay(model)
    with source.record():
        losses = run(model, twice, batches, (wrap_of(kind),) * 2)
    message = (
        r"^RoutingReplay: first\.moe must be called once in a checkpoint whose forward pass was "
        "neither recorded nor forced, got a second call in its recomputation$"
    )
    with (
        RoutingReplay(model, source.decisions).force(),
        pytest.raises(RuntimeError, match=message),
    ):
        losses[0].backward()


def test_a_recomputation_with_another_number_of_calls_is_refused() -> None:
    model, x = Model(), torch.randn(T, H, requires_grad=True)
    replay = RoutingReplay(model)
    calls = 1

    def function(z: Tensor) -> Tensor:
        for _ in range(calls):
            z = model.first(z)
        return z

    with replay.record():
        y = checkpoint(function, x, use_reentrant=True)
    calls = 2
    message = (
        r"^RoutingReplay: first\.moe must be called as often in a recomputation as in its forward "
        "pass, 1 times, got one call more$"
    )
    with replay.force(), pytest.raises(RuntimeError, match=message):
        y.sum().backward()


# ---- what is kept


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_longer_than_the_graph(kind: str) -> None:
    model, batches = Model(), micro_batches()
    replay = RoutingReplay(model)
    with replay.record():
        losses = run(model, nested, batches, (wrap_of(kind),) * 2)
    assert len(replay._checkpoints) > 0
    with replay.force():
        backward(model, losses, batches, (0, 1, 2))
    del losses
    gc.collect()
    assert len(replay._checkpoints) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
def test_copies(copied: Callable[[RoutingReplay], RoutingReplay]) -> None:
    model, batches = Model(), micro_batches()
    replay = RoutingReplay(model)
    with replay.record():
        losses = run(model, each, batches, (wrap_of(KINDS[1]),) * 2)
    other = copied(replay)
    assert [len(calls) for calls in other.decisions.values()] == [3, 3]
    assert len(losses) == 3
