"""Which terms are the same for one batch and for its micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from balanced import (
    F64,
    RING,
    E,
    H,
    K,
    S,
    make,
)
from op_case import tolerance
from plain_moe import gradients
from torchmoe.nn import Assistance, Balance, Gate, MoE

STEPS = 8


def step_gradients(moe: MoE, batches: Sequence[Tensor]) -> tuple[dict[str, Tensor], float]:
    """Of the mean over the micro-batches of aux_loss, and that mean."""
    moe.zero_grad()
    total = 0.0
    for x in batches:
        output = moe(x)
        aux_loss = output.aux_loss / len(batches)
        (0 * output.hidden_states.sum() + aux_loss).backward()
        total += aux_loss.item()
    return gradients(moe), total


def differ(moe: MoE) -> bool:
    """Whether eight micro-batches give another gradient than one batch, beyond rounding."""
    x = torch.randn(STEPS, S, H, dtype=F64)
    one, eight = step_gradients(moe, [x]), step_gradients(moe, x.unsqueeze(1).unbind())
    longest = STEPS * S * max(K, H)
    within = abs(one[1] - eight[1]) <= tolerance(
        torch.tensor(one[1]), n=longest, wide=F64, stored=F64
    )
    for name, gradient in one[0].items():
        atol = tolerance(gradient, n=longest, wide=F64, stored=F64)
        within &= bool((gradient - eight[0][name]).abs().max() <= atol)
    assert one[0]["router.weight"].abs().max() > 1e-4
    return not within


@pytest.mark.parametrize(
    "options",
    [
        {"balance": Balance(weight=1.0, fraction_from="sequence")},
        {"balance": Balance(weight=1.0, fraction_from="sequence", fraction_choices="first")},
        {"balance": Balance(weight=1.0, fraction_from="history")},
        {"balance": Balance(0, z_loss_weight=1.0)},
        {"balance": Balance(0, losses=[("router_z_loss", 1.0)])},
        {"balance": Balance(0, losses=[("local_entropy_loss", 1.0)])},
        {"balance": Balance(weight=1.0, fraction_from="history"), "gate": Gate("sigmoid")},
    ],
    ids=["sequence", "first", "history", "z", "z_by_name", "local_entropy", "sigmoid"],
)
def test_eight_micro_batches_are_one_batch(options: dict[str, Any]) -> None:
    """Exactly, where the term is a mean over tokens or sequences of what each of them gives."""
    moe = make(**options)
    if moe.router.usage is not None:
        moe.router.usage.copy_(torch.arange(E) / 28)
    assert not differ(moe)


@pytest.mark.parametrize(
    "options",
    [
        {"balance": Balance(weight=1.0)},
        {"balance": Balance(weight=1.0, fraction_from="global_batch")},
        *[
            {"balance": Balance(0, losses=[(name, 1.0)])}
            for name in (
                "importance_loss",
                "load_loss",
                "global_entropy_loss",
                "mutual_information_loss",
            )
        ],
    ],
    ids=["batch", "global", "importance", "load", "global_entropy", "mutual_information"],
)
def test_what_is_of_the_whole_batch_is_another_number_for_its_parts(
    options: dict[str, Any],
) -> None:
    """So the documentation must not promise it."""
    assert differ(make(**options))


def test_eight_micro_batches_move_the_state_as_one_batch() -> None:
    options = {
        "balance": Balance(selection_bias_rate=0.01),
        "gate": Gate("sigmoid"),
        "assistance": Assistance(RING, threshold=1.0, lower_threshold=0.5, patience=1),
    }
    one = make(**options)
    eight = copy.deepcopy(one)
    x = torch.randn(STEPS, S, H, dtype=F64)
    one.update(one(x).routing)
    eight.update([eight(micro_batch).routing for micro_batch in x])
    assert one.assistance.assisted.any()
    assert (one.selection_bias != 0).any()
    for name, value in one.state_dict().items():
        assert torch.equal(eight.state_dict()[name], value), name
