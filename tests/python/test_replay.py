"""Routing replay: the recorded ids, and all that follows from them, bit for bit."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import torchmoe
from copies import by_pickle
from plain_moe import gradients, tensors_of
from replayed import INNER, E, H, K, T, random_layer, same
from torchmoe import RoutingReplay
from torchmoe.nn import (
    Capacity,
    Decision,
    Gate,
    MoE,
    MoEOutput,
    Routing,
    WithAttachedLoss,
    known_estimators,
)

LAYERS = ("blocks.0.moe", "blocks.1.moe")

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """A residual layer after something that draws, recomputed where it is checkpointed."""

    def __init__(self, moe: MoE, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.moe = moe
        self.use_reentrant = use_reentrant
        self.noise = 0.0
        self.seen: list[Routing] = []

    def run(self, x: Tensor) -> Tensor:
        output: MoEOutput = self.moe(x + self.noise * torch.randn_like(x))
        self.seen.append(output.routing)
        # What tanh saves is recomputed last, so that recomputation runs through the whole layer.
        return x + torch.tanh(output.hidden_states) + 0 * output.aux_loss

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.run(x)
        # With the generator as it is now: the recomputation draws other numbers.
        return checkpoint(self.run, x, use_reentrant=self.use_reentrant, preserve_rng_state=False)


class Model(nn.Module):
    def __init__(
        self,
        build: Callable[[], MoE] = random_layer,
        *,
        calls: int = 1,
        use_reentrant: bool | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(build(), use_reentrant) for _ in LAYERS)
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            for block in self.blocks:
                x = block(x)
        return x

    def pop_seen(self) -> dict[str, list[Routing]]:
        """The routings of every call since the last time, recomputations among them."""
        found = {}
        for name, block in zip(LAYERS, self.blocks, strict=True):
            found[name], block.seen = block.seen, []
        return found


def ids(routings: list[Routing]) -> list[Decision]:
    return [routing.decision for routing in routings]


def check_forced(recorded: dict[str, list[Routing]], forced: dict[str, list[Routing]]) -> None:
    for name in LAYERS:
        assert len(recorded[name]) == len(forced[name]) > 0
        for one, other in zip(recorded[name], forced[name], strict=True):
            assert same(one.decision, other.decision), name


# ---- the same ids


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("logit_noise", [0.0, 1.0])
def test_a_forced_pass_has_the_recorded_ids(logit_noise: float, training: bool) -> None:
    model = Model(lambda: random_layer(logit_noise=logit_noise)).train(training)
    replay = RoutingReplay(model)
    x = torch.randn(T, H)
    with replay.record():
        model(x)
    recorded = model.pop_seen()
    assert all((routing.selected != routing.indices).any() for [routing] in recorded.values())
    model(x)
    plain = model.pop_seen()
    assert same(*ids(recorded[LAYERS[0]] + plain[LAYERS[0]])) is not training
    for _ in range(2):
        with replay.force():
            model(x)
        check_forced(recorded, model.pop_seen())
    model(x)
    assert same(*ids(recorded[LAYERS[0]] + model.pop_seen()[LAYERS[0]])) is not training


CAPACITIES = {
    "none": None,
    "drop": Capacity(0.9, priority="random"),
    "after drop": Capacity(0.9, priority="random", normalize="after_drop"),
    "by weight": Capacity(0.9, priority="weight", overflow="next_best"),
    "backup": Capacity(0.9, priority="random", overflow="backup", backup=(1, 2, 3, 4, 0)),
}


@pytest.mark.parametrize("estimator", sorted({*known_estimators()} - {"sparsemixer"}))
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_hidden_states_losses_and_gradients_have_the_same_bits(
    capacity: str, estimator: str
) -> None:
    model = Model(
        lambda: random_layer(gate=Gate(estimator=estimator), capacity=CAPACITIES[capacity])
    )
    replay = RoutingReplay(model)
    x = torch.randn(T, H)
    seen = []
    for context in (replay.record, replay.force):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        with context():
            y = model(leaf)
            (
                y.square().sum() + sum(of[-1].losses["router_z_loss"] for of in moe_seen(model))
            ).backward()
        routings = [tensors_of(routing) for [routing] in model.pop_seen().values()]
        seen.append([y, leaf.grad, *gradients(model).values()])
        seen[-1] += [tensor for tensors in routings for tensor in tensors.values()]
        torch.randn(5)  # The generator is elsewhere than it was.
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one, other)


def moe_seen(model: Model) -> list[list[Routing]]:
    return [block.seen for block in model.blocks]


# ---- ids from elsewhere


def test_ids_of_one_checkpoint_and_weights_of_another() -> None:
    one, other = (Model(lambda: MoE(H, INNER, E, K)) for _ in range(2))
    x = torch.randn(T, H)
    replay = RoutingReplay(one)
    with replay.record():
        one(x)
    with RoutingReplay(other, replay.decisions).force():
        other(x)
    recorded, forced = one.pop_seen(), other.pop_seen()
    check_forced(recorded, forced)
    [routing] = forced[LAYERS[0]]
    logits = other.blocks[0].moe.router(x)
    assert torch.equal(routing.logits, logits)
    assert torch.equal(
        routing.weights, other.blocks[0].moe.estimator.weigh(logits, routing.selected)
    )
    chosen = logits.gather(1, routing.indices).softmax(dim=1)
    assert_close(routing.weights, chosen)
    other(x)
    assert not same(*ids(recorded[LAYERS[0]] + other.pop_seen()[LAYERS[0]]))


# ---- recomputation


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("forward_too", [False, True])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_routes_as_recorded(
    use_reentrant: bool, forward_too: bool, calls: int
) -> None:
    model = Model(calls=calls, use_reentrant=use_reentrant)
    for block in model.blocks:
        block.noise = 1.0
    replay = RoutingReplay(model)
    x = torch.randn(T, H, requires_grad=True)
    with replay.record():
        y = model(x)
    recorded = model.pop_seen()
    if forward_too:
        with replay.force():
            model(x).square().sum().backward()
        expected = {name: of + of[::-1] for name, of in recorded.items()}
    else:
        with replay.force():
            y.square().sum().backward()
        expected = {name: of[::-1] for name, of in recorded.items()}
    forced = model.pop_seen()
    check_forced(expected, forced)
    # What was to be overruled did happen.
    first, last = (of[LAYERS[0]] for of in (recorded, forced))
    assert not torch.equal(first[0].logits, last[-1].logits)
    # The first call's, recomputed, and not the last one's.
    assert calls == 1 or not same(first[0].decision, first[1].decision)
    model(x).square().sum().backward()
    plain = model.pop_seen()[LAYERS[0]]
    assert not same(plain[0].decision, plain[-1].decision)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"gate": Gate(estimator="gumbel_straight_through")},
        {"gate": Gate(estimator="sparsemixer")},
        {"gate": Gate(estimator="exact"), "capacity": Capacity(0.5, priority="random")},
        {
            "gate": Gate(estimator="sparsemixer"),
            "capacity": Capacity(0.7, priority="weight", overflow="next_best"),
        },
    ],
)
def test_forced_recomputation_has_the_gradient_of_a_plain_one(
    options: dict[str, Any], use_reentrant: bool
) -> None:
    # Dropout comes after the layer: it must find the generator as the forward pass left it.
    layer = WithAttachedLoss(random_layer(logit_noise=0.5, **{"capacity": None} | options))
    model = nn.Sequential(layer, nn.Dropout(0.5), nn.Tanh())
    replay = RoutingReplay(model)
    x = torch.randn(T, H)
    seen = []
    for forced in (False, True):
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        torch.manual_seed(4)
        with replay.record():
            y = checkpoint(model, leaf, use_reentrant=use_reentrant)
        with replay.force() if forced else nullcontext():
            y.square().sum().backward()
        seen.append([y, leaf.grad, *gradients(model).values()])
    for plain, again in zip(*seen, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_second_backward_pass_recomputes_the_same(use_reentrant: bool) -> None:
    model = Model(use_reentrant=use_reentrant)
    replay = RoutingReplay(model)
    with replay.record():
        y = model(torch.randn(T, H, requires_grad=True))
    recorded = model.pop_seen()
    with replay.force():
        y.square().sum().backward(retain_graph=True)
        y.square().sum().backward()
    check_forced({name: of * 2 for name, of in recorded.items()}, model.pop_seen())


@pytest.mark.parametrize("entered", ["record", "force"])
@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
def test_a_copy_of_the_model_is_not_followed(entered: str, copied: Any) -> None:
    model = random_layer()
    replay = RoutingReplay(model)
    x = torch.randn(T, H)
    with replay.record():
        model(x)
    with getattr(replay, entered)():
        model(x)
        other = copied(model)
        other(x)
        assert len(replay.decisions["moe"]) == 1
    other(x)
    assert len(replay.decisions["moe"]) == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_forced_recomputation_of_several_micro_batches(use_reentrant: bool) -> None:
    model = Model(use_reentrant=use_reentrant)
    replay = RoutingReplay(model)
    batches = [torch.randn(tokens, H, requires_grad=True) for tokens in (T, 11)]
    with replay.record():
        for x in batches:
            model(x)
    recorded = model.pop_seen()
    with replay.force():
        for x in batches:
            model(x).square().sum().backward()
    expected = {name: [of[0], of[0], of[1], of[1]] for name, of in recorded.items()}
    check_forced(expected, model.pop_seen())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_is_not_recorded(use_reentrant: bool) -> None:
    model = Model(calls=2, use_reentrant=use_reentrant)
    replay = RoutingReplay(model)
    with replay.record():
        model(torch.randn(T, H, requires_grad=True)).square().sum().backward()
    seen = model.pop_seen()
    for name in LAYERS:
        assert len(seen[name]) == 4
        assert len(replay.decisions[name]) == 2
        for decision, routing in zip(replay.decisions[name], seen[name][:2], strict=True):
            assert same(Decision(*decision), routing.decision)


# ---- to and from files


def test_decisions_go_through_a_file() -> None:
    model = Model(calls=2)
    replay = RoutingReplay(model)
    x = torch.randn(T, H)
    with replay.record():
        model(x)
    recorded = model.pop_seen()
    file = io.BytesIO()
    torch.save(replay.decisions, file)
    file.seek(0)
    loaded = RoutingReplay(model, torch.load(file, weights_only=True))
    with loaded.force():
        model(x)
    check_forced(recorded, model.pop_seen())


def test_what_is_recorded_holds_no_graph() -> None:
    model = Model()
    replay = RoutingReplay(model)
    with replay.record():
        model(torch.randn(T, H))
    kept = [tensor for [decision] in replay.decisions.values() for tensor in decision]
    assert len(kept) == 4
    assert all(tensor.dtype == torch.int64 and tensor.grad_fn is None for tensor in kept)


# ---- hooks


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


@pytest.mark.parametrize("context", ["record", "force"])
def test_no_hook_is_left(context: str) -> None:
    model = Model()
    replay = RoutingReplay(model)
    with replay.record():
        model(torch.randn(T, H))
    with getattr(replay, context)():
        assert hooks_of(model) == len(LAYERS)
    assert hooks_of(model) == 0
    with pytest.raises(RuntimeError, match="hidden_size"), getattr(replay, context)():
        model(torch.randn(T, H + 1))
    assert hooks_of(model) == 0


@pytest.mark.parametrize("method", ["record", "force"])
def test_a_call_without_with_says_so(method: str) -> None:
    model = Model()
    replay = RoutingReplay(model)
    message = (
        rf"^RoutingReplay: {method} must be entered, as in `with replay\.{method}\(\):`, got a "
    )
    with pytest.warns(RuntimeWarning, match=message) as caught:
        getattr(replay, method)()
    assert [warning.filename for warning in caught] == [__file__]
    assert hooks_of(model) == 0


def test_force_goes_around_a_function() -> None:
    model = Model()
    replay = RoutingReplay(model)
    x = torch.randn(T, H)
    with replay.record():
        model(x)
    recorded = model.pop_seen()
    forced = replay.force()(model)
    for _ in range(2):
        forced(x)
        check_forced(recorded, model.pop_seen())
    assert hooks_of(model) == 0


def test_record_forgets_what_was_before() -> None:
    model = Model()
    replay = RoutingReplay(model)
    with replay.record():
        model(torch.randn(T, H))
        model(torch.randn(11, H))
    first = replay.decisions
    with replay.record():
        model(torch.randn(3, H))
    assert [len(of) for of in first.values()] == [2, 2]
    assert [len(of) for of in replay.decisions.values()] == [1, 1]
    model(torch.randn(4, H))
    assert [len(of) for of in replay.decisions.values()] == [1, 1]


def test_one_records_what_another_forces() -> None:
    model = Model()
    x = torch.randn(T, H)
    source, copied = RoutingReplay(model), RoutingReplay(model)
    with source.record():
        model(x)
    with copied.record(), source.force():
        model(x)
    for name in LAYERS:
        [one], [other] = source.decisions[name], copied.decisions[name]
        assert same(Decision(*one), Decision(*other))


def test_a_hook_that_replaces_the_output_does_not_hide_it() -> None:
    model = nn.Sequential(random_layer())
    model[0].register_forward_hook(lambda module, args, output: output.hidden_states)
    replay = RoutingReplay(model)
    with replay.record():
        model(torch.randn(T, H))
    assert len(replay.decisions["0"]) == 1


def test_an_attached_loss_and_the_layer_itself() -> None:
    layer = WithAttachedLoss(random_layer())
    x = torch.randn(T, H)
    replay = RoutingReplay(layer)
    with replay.record():
        y = layer(x)
    assert list(replay.decisions) == ["moe"]
    with RoutingReplay(layer.moe, replay.decisions).force():
        assert torch.equal(layer(x), y)
    assert torch.equal(layer(x, decision=Decision(*replay.decisions["moe"][0])), y)
    assert not torch.equal(layer(x), y)


def test_watch_counts_a_forced_pass_as_the_recorded_one() -> None:
    model = Model()
    replay = RoutingReplay(model)
    x = torch.randn(T, H)
    read = []
    with torchmoe.watch(model) as watcher:
        for context in (replay.record, replay.force):
            with context():
                model(x)
            read.append(watcher.collect())
    for name in LAYERS:
        for one, other in zip(*(collected[name] for collected in read), strict=True):
            assert torch.equal(one, other)


# Where a graph is broken, torch's own tracing looks at .grad of what the first half computed.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("entered", ["before the first run", "after reset"])
def test_a_compiled_model_is_recorded_and_forced(entered: str) -> None:
    model = Model(calls=2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    replay = RoutingReplay(compiled)
    if entered == "after reset":
        compiled(torch.randn(T, H))
        torch.compiler.reset()
        model.pop_seen()
    frames = []
    for _ in range(3):
        x = torch.randn(T, H)
        with replay.record():
            compiled(x).square().sum().backward()
        recorded = model.pop_seen()
        for name in LAYERS:
            for decision, routing in zip(replay.decisions[name], recorded[name], strict=True):
                assert same(Decision(*decision), routing.decision)
        with replay.force():
            compiled(x).square().sum().backward()
        check_forced(recorded, model.pop_seen())
        frames.append(counter.frame_count)
    assert frames == 3 * frames[:1]


# ---- bad input


def test_errors() -> None:
    with pytest.raises(
        ValueError, match=r"^RoutingReplay: model must contain a torchmoe\.nn\.MoE, got Linear$"
    ):
        RoutingReplay(nn.Linear(H, H))
    moe = MoE(H, INNER, E, K)
    decision = moe(torch.randn(T, H)).routing.decision
    with pytest.raises(
        ValueError,
        match=r"^RoutingReplay: decisions must be of the layers blocks\.0\.moe, blocks\.1\.moe, "
        "got moe$",
    ):
        RoutingReplay(Model(), {"moe": [decision]})


def test_more_calls_than_recorded() -> None:
    model = Model()
    replay = RoutingReplay(model)
    message = (
        r"^RoutingReplay: blocks\.0\.moe must be called as often as it was recorded, {} times, "
        "got one call more$"
    )
    with replay.force(), pytest.raises(RuntimeError, match=message.format(0)):
        model(torch.randn(T, H))
    x = torch.randn(T, H, requires_grad=True)
    with replay.record():
        model(x)
        model(x)
    with replay.force():
        model(x)
        model(x)
        with pytest.raises(RuntimeError, match=message.format(2)):
            model(x)
    for block in model.blocks:
        block.use_reentrant = False
    y = [model(x) for _ in range(3)]
    with replay.force(), pytest.raises(RuntimeError, match=message.format(2).replace("0", "1", 1)):
        sum(y).sum().backward()


def test_another_number_of_tokens() -> None:
    model = Model()
    replay = RoutingReplay(model)
    with replay.record():
        model(torch.randn(T, H))
    message = (
        r"MoE: decision.selected must be int64 of shape \[num_tokens, top_k \+ 1 with assistance\] "
        rf"= \[{T + 1}, 3\], got torch.int64 of shape \[{T}, 3\]"
    )
    with replay.force(), pytest.raises(RuntimeError, match=message):
        model(torch.randn(T + 1, H))
