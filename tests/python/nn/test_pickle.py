"""Pickling a layer: a process group cannot travel, and the copy says so."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from torchmoe.nn import Balance, MoE, WithAttachedLoss


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.new_group([0])
    dist.destroy_process_group()


def layer(group: dist.ProcessGroup | None) -> MoE:
    return MoE(6, 5, 4, 2, balance=Balance(fraction_from="global_batch"), process_group=group)


X = torch.randn(7, 6)


def test_a_group_is_lost_and_must_be_given_again(group: dist.ProcessGroup) -> None:
    moe = layer(group)
    file = io.BytesIO()
    torch.save(WithAttachedLoss(moe), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False).moe
    for other in (loaded, pickle.loads(pickle.dumps(moe)), pickle.loads(pickle.dumps(loaded))):
        message = (
            r"^MoE: process_group must be set .*, got none in place of the group of ranks \[0\]"
        )
        with pytest.raises(RuntimeError, match=message):
            other(X)
        with pytest.raises(RuntimeError, match=message):
            other.update(moe(X).routing)
        other.process_group = group
        torch.testing.assert_close(other(X).hidden_states, moe(X).hidden_states)
        other.process_group = None
        other(X)
        with pytest.raises(TypeError, match=r"^MoE: process_group must be a ProcessGroup or None"):
            other.process_group = "all"


def test_a_group_may_have_been_destroyed() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    moe = layer(dist.new_group([0]))
    dist.destroy_process_group()
    loaded = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(moe))))
    with pytest.raises(RuntimeError, match=r"in place of the group of ranks unknown$"):
        loaded(X)


def test_copies_share_it(group: dist.ProcessGroup) -> None:
    moe = layer(group)
    assert copy.deepcopy(moe).process_group is group


def test_all_processes_stay_all() -> None:
    moe = pickle.loads(pickle.dumps(layer(None)))
    assert moe.process_group is None
    moe(X)
