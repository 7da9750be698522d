"""How a replay hangs on a model, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import torchmoe
from replayed import INNER, E, H, K, T, random_layer, same
from replayed_model import LAYERS, Model, check_forced
from torchmoe import RoutingReplay
from torchmoe.nn import (
    Decision,
    MoE,
    WithAttachedLoss,
)

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
