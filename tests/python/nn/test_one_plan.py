"""A forward pass sorts its slots by expert once, whatever becomes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchmoe.nn import Assistance, Balance, Capacity, Gate, MoE

T, H, INNER, E, K = 12, 4, 3, 4, 2
RING = (1, 2, 3, 0)


class Calls(TorchDispatchMode):
    """The names of the ops below autograd, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"capacity": Capacity(1)},
        {"capacity": Capacity(1, overflow="next_best", priority="weight")},
        {"assistance": Assistance(RING), "capacity": Capacity(1, overflow="backup", backup=RING)},
        {"balance": Balance(fraction_choices="first", losses=[("importance_loss", 0.1)])},
        {"balance": Balance(fraction_from="sequence")},
        {"gate": Gate(estimator="straight_through_dense")},
    ],
    ids=["plain", "capacity", "rerouted", "assisted", "first", "sequence", "dense"],
)
@pytest.mark.parametrize("learns", [True, False])
def test_once(options: dict[str, Any], learns: bool) -> None:
    moe = MoE(H, INNER, E, K, **options)
    with Calls() as calls, torch.set_grad_enabled(learns):
        routing = moe(torch.randn(2, T // 2, H)).routing
    # Where no gradient is to come, expert_mlp is one op that forms its plan out of sight.
    plans = sum(calls.names.count(f"torchmoe::{op}") for op in ("dispatch_plan", "expert_mlp"))
    assert plans == 1
    assert routing.tokens_per_expert.sum() == T * K
    assert routing.kept_per_expert.tolist() == [int((routing.indices == e).sum()) for e in range(E)]
