"""Routing replay: the recorded ids, and all that follows from them, bit for bit."""

from __future__ import annotations

import copy
import io
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from copies import by_pickle
from plain_moe import gradients, tensors_of
from replayed import INNER, E, H, K, T, random_layer, same
from replayed_model import LAYERS, Model, check_forced, ids
from torchmoe import RoutingReplay
from torchmoe.nn import (
    Capacity,
    Decision,
    Gate,
    MoE,
    Routing,
    WithAttachedLoss,
    known_estimators,
)

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
