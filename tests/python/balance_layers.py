"""Layers with everything that concerns balance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from balanced import (
    F64,
    RING,
    TERMS,
    H,
    T,
    largest_logit,
    make,
)
from torchmoe.nn import Assistance, Balance, Capacity, Gate, MoE

FROM = ("batch", "sequence", "global_batch", "history")
every_source = pytest.mark.parametrize("fraction_from", FROM)


ALL_TERMS = Balance(
    weight=0.5,
    z_loss_weight=0.25,
    losses=[*((name, 0.125) for name in TERMS[:-1]), (largest_logit, 0.0625)],
    fraction_from="history",
    selection_bias_rate=0.125,
    selection_bias_centred=True,
)


def everything(**options: Any) -> MoE:
    """A layer with all that concerns balance at once, in a state that is not the first one."""
    given: dict[str, Any] = {
        "gate": Gate("sigmoid", num_groups=4, top_groups=2),
        "capacity": Capacity(
            0.9, overflow="backup", backup=RING, dynamic=True, priority="random", minimum=1
        ),
        "assistance": Assistance(RING, threshold=1.0, lower_threshold=0.5, patience=2),
        "balance": ALL_TERMS,
        "shared_experts": nn.Linear(H, H, dtype=options.get("dtype", F64)),
        "routed_scaling_factor": 2.5,
    } | options
    moe = make(**given)
    for _ in range(3):
        moe.update(moe(torch.randn(T, H, dtype=moe.router.weight.dtype)).routing)
    if moe.assistance is not None:
        assert moe.assistance.assisted.any()
    return moe
