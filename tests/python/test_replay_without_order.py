"""Replay where nothing is known of the forward pass, and what it keeps."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from checkpointed_models import (
    KINDS,
    Model,
    assert_same,
    backward,
    each,
    micro_batches,
    nested,
    run,
    twice,
    wrap_of,
)
from copies import by_pickle
from replayed import H, T
from torchmoe import RoutingReplay

pytestmark = [
    # Of a reentrant checkpoint in another one, whose forward pass keeps no graph.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
    # The gradients of one model are compared, hundreds of times.
    pytest.mark.filterwarnings("ignore:MoE. update must be called once:UserWarning"),
]


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
