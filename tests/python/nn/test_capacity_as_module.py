"""A layer with a capacity as a module, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from capacity_layers import INNER, RING, E, H, K, T, make
from compiled_once import check_compiled_once
from limited import F64
from plain_moe import tensors_of
from torchmoe.nn import Capacity, MoE, Router

# --- as part of a module ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "capacity",
    [
        Capacity(0.8, priority="random"),
        Capacity(0.8, priority="weight", overflow="next_best"),
        Capacity(0.8, overflow="backup", backup=RING, normalize="after_drop", rounding="down"),
        Capacity(0.8, dynamic=True, minimum=3),
    ],
    ids=["random", "weight_next_best", "backup", "dynamic"],
)
def test_compiles_once_for_all_token_counts(capacity: Capacity) -> None:
    moe = make(capacity, dtype=torch.float32)
    check_compiled_once(moe, H, after=lambda turn, routing: moe.update(routing))


def test_a_dynamic_capacity_compiles_without_a_mask() -> None:
    moe = make(Capacity(0.8, dynamic=True), dtype=torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (11, 17, 40):
        x = torch.randn(num_tokens, H)
        assert_close(tensors_of(compiled(x).routing), tensors_of(moe(x).routing))
        moe.update(moe(x).routing)
    assert counter.frame_count == 1


def test_copies_keep_the_backup() -> None:
    moe = make(Capacity(0.8, overflow="backup", backup=list(RING)))
    x = torch.randn(T, H, dtype=F64)
    expected = moe(x).routing.indices
    for other in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert torch.equal(other(x).routing.indices, expected)
    with torch.device("meta"):
        empty = make(moe.capacity)
    empty = empty.to_empty(device="cpu")
    empty.reset_parameters()
    empty.load_state_dict(moe.state_dict())
    assert torch.equal(empty(x).routing.indices, expected)
    narrow = moe.bfloat16()
    assert bool((narrow(x.bfloat16()).routing.indices < E).all())


def test_capacity_is_a_value() -> None:
    capacity = Capacity(1.25, overflow="backup", backup=[1, 0], priority="weight")
    same = Capacity(1.25, overflow="backup", backup=(1, 0), priority="weight")
    assert capacity == same
    assert hash(capacity) == hash(same)
    assert capacity.backup == (1, 0)
    assert capacity != Capacity(1.25, overflow="backup", backup=(1, 0))
    assert pickle.loads(pickle.dumps(capacity)) == capacity
    for part in ("priority='weight'", "overflow='backup'", "backup=(1, 0)", "factor=1.25"):
        assert part in repr(capacity)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"priority": "age"},
            ValueError,
            r'priority must be one of "random", "weight", got "age"',
        ),
        (
            {"overflow": "spill"},
            ValueError,
            r'overflow must be one of "drop", "next_best", "backup", got "spill"',
        ),
        (
            {"overflow": "backup"},
            ValueError,
            r'backup must be given with overflow "backup", got None',
        ),
        (
            {"backup": (1, 0)},
            ValueError,
            r'backup must be None with overflow "drop", got \(1, 0\)',
        ),
        (
            {"backup": (1, 0), "overflow": "next_best"},
            ValueError,
            r'backup must be None with overflow "next_best", got \(1, 0\)',
        ),
        (
            {"backup": (1, 1), "overflow": "backup"},
            ValueError,
            r"backup must be another expert in \[0, 2\) for every expert, got 1 for expert 1",
        ),
        (
            {"backup": (1, 2), "overflow": "backup"},
            ValueError,
            r"backup must be another expert in \[0, 2\) for every expert, got 2 for expert 1",
        ),
        (
            {"backup": (-1, 0), "overflow": "backup"},
            ValueError,
            r"backup must be another expert in \[0, 2\) for every expert, got -1 for expert 0",
        ),
        (
            {"backup": (True, 0), "overflow": "backup"},
            TypeError,
            r"backup must be an int, got True",
        ),
        ({"minimum": 1.5}, TypeError, r"minimum must be an int, got 1.5"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^Capacity: {message}$"):
        Capacity(1.0, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"capacity": 1.25},
            TypeError,
            r"capacity must be a Capacity or None, such as Capacity\(1.25\), got 1.25",
        ),
        (
            {"capacity": Capacity(1, overflow="backup", backup=(1, 0))},
            ValueError,
            r"capacity.backup must have 5 entries, one for each expert, got 2",
        ),
        (
            {"capacity": Capacity(1, dynamic=True), "router": Router(H, E)},
            ValueError,
            r"router must keep usage for a dynamic capacity, as Router\(track_usage=True\) does, "
            r"got \w+ without",
        ),
    ],
)
def test_layer_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^MoE: {message}$"):
        MoE(H, INNER, E, K, **options)
