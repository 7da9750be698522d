"""Configuration of gate and capacity."""

from __future__ import annotations

import dataclasses
from decimal import Decimal
from fractions import Fraction

import pytest
import torch

from torchmoe.nn import Capacity, Gate, MoE


def test_defaults() -> None:
    assert Gate() == Gate(score_function="softmax", normalize=None, estimator="exact")
    assert Capacity(1.25) == Capacity(1.25, None, 0, "choice", "drop", "before_drop")
    assert repr(Capacity(1.25, order="token")) == "Capacity(factor=1.25, order='token')"
    assert MoE(4, 4, 4, 2).estimator.normalize == "topk"
    assert MoE(4, 4, 4, 1).estimator.normalize == "none"
    assert MoE(4, 4, 4, 1, gate=Gate(normalize="uniform")).estimator.normalize == "uniform"


@pytest.mark.parametrize(("config", "name"), [(Gate(), "normalize"), (Capacity(1), "factor")])
def test_frozen(config: object, name: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, "topk")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"score_function": "tanh"},
            ValueError,
            r'Gate: score_function must be one of "softmax", "sigmoid", got "tanh"',
        ),
        (
            {"normalize": "l2"},
            ValueError,
            r'Gate: normalize must be one of "none", "topk", "uniform", got "l2"',
        ),
        (
            {"estimator": "reinforce"},
            ValueError,
            r'Gate: estimator must be one of "exact", "straight_through".*, got "reinforce"',
        ),
        ({"estimator": 3}, TypeError, r"Gate: estimator must be a name or an Estimator, got 3"),
    ],
)
def test_gate_errors(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Gate(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"factor": -1.0}, ValueError, r"Capacity: factor must be a finite number >= 0, got -1.0"),
        ({"factor": float("inf")}, ValueError, r"Capacity: factor must be .*, got inf"),
        ({"factor": "1.1"}, TypeError, r"Capacity: factor must be a number, got '1.1'"),
        ({"eval_factor": float("nan")}, ValueError, r"Capacity: eval_factor must be .*, got nan"),
        ({"minimum": -1}, ValueError, r"Capacity: minimum must be >= 0, got -1"),
        (
            {"order": "random"},
            ValueError,
            r'Capacity: order must be one of "choice", "token", got "random"',
        ),
        (
            {"overflow": "spill"},
            ValueError,
            r'Capacity: overflow must be one of "drop", "next_best", "backup", got',
        ),
        (
            {"normalize": "topk"},
            ValueError,
            r'Capacity: normalize must be one of "before_drop", "after_drop", got "topk"',
        ),
    ],
)
def test_capacity_errors(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Capacity(**({"factor": 1.0} | options))


@pytest.mark.parametrize("factor", [1.1, Fraction(11, 10), Decimal("1.1")])
def test_slots_are_exact(factor: float) -> None:
    capacity = Capacity(factor, eval_factor=2, minimum=3)
    assert capacity.slots(200, 4, 2, training=True) == 110
    assert capacity.slots(200, 4, 2, training=False) == 200
    assert capacity.slots(4, 4, 1, training=True) == 3
    counted = capacity.slots(torch.tensor(200), 4, 2, training=True)
    assert torch.equal(counted, torch.tensor(110))
