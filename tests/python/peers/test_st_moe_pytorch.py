"""The presets st_moe and gshard against st-moe-pytorch, a transcription of Mesh TensorFlow's code.

Its thresholds are 0 here, so that a second expert is never left out at random, and its dispatch
tensor has no straight-through gradient; the input is one sequence, since a sequence is a group.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from op_case import assert_close, tolerance
from peers.comparison import (
    Result,
    Sizes,
    assert_agree,
    assert_drops,
    copy_router,
    gradients,
    step,
)
from torchmoe import ops, presets
from torchmoe.nn import ExpertList, MoE

st_moe = pytest.importorskip("st_moe_pytorch.st_moe_pytorch")

# It forms the experts' shares in float32 whatever the type: exact where T is a power of two.
CASES = [
    (Sizes(32, 8, 12, 4), torch.float64),
    (Sizes(128, 16, 24, 8), torch.float64),
    (Sizes(32, 8, 12, 16), torch.float64),  # the minimum of 4 is more than 1.25 T / E
    (Sizes(100, 16, 24, 8), torch.float32),  # 15.625 is rounded down
    (Sizes(250, 8, 12, 5), torch.float32),
]


def make(sizes: Sizes, dtype: torch.dtype, preset: presets.Preset, **options: Any) -> tuple:
    """The peer's layer and ours, with the same weights."""
    peer = st_moe.MoE(
        sizes.H,
        sizes.E,
        threshold_train=0.0,
        threshold_eval=0.0,
        straight_through_dispatch_tensor=False,
        experts=nn.ModuleList(st_moe.Expert(sizes.H) for _ in range(sizes.E)),
        **options,
    ).to(dtype)
    experts = ExpertList(deepcopy(list(peer.experts.experts)))
    moe = preset.layer(sizes.H, None, sizes.E, experts=experts, dtype=dtype)
    copy_router(moe, peer.gate.to_gates.weight)
    return peer, moe


def peer_step(peer: nn.Module, x: Tensor, direction: Tensor) -> Result:
    x = x.clone().requires_grad_()
    output = peer(x.unsqueeze(0))
    y = output.outputs.squeeze(0)
    ((y * direction).sum() + output.total_aux_loss).backward()
    dispatch, combine, _, _ = peer.gate(x.unsqueeze(0))  # [1, T, E, C]
    return Result(
        kept=dispatch.squeeze(0).sum(-1).bool(),
        weights=combine.squeeze(0).sum(-1).detach(),
        y=y.detach(),
        losses={
            "load_balancing_loss": output.balance_loss.detach(),
            "router_z_loss": output.router_z_loss.detach(),
        },
        gradients=gradients(x, peer.gate.to_gates.weight, peer.experts),
    )


def balance_after_drop(moe: MoE, x: Tensor) -> Tensor:
    """The peer's balancing loss, which counts the first choices that capacity leaves.

    It keeps a view of the first choices' mask and later changes the mask in place. Mesh TensorFlow
    counts before dropping, and so do we.
    """
    routing = moe(x).routing
    first = routing.indices[:, 0]
    counts = torch.bincount(first[first >= 0], minlength=moe.num_experts)
    fraction = counts.to(x.dtype) / x.shape[0]
    return ops.load_balancing_loss(routing.logits, fraction, score_function="softmax").detach()


@pytest.mark.parametrize(("sizes", "dtype"), CASES, ids=str)
def test_st_moe(sizes: Sizes, dtype: torch.dtype) -> None:
    """Its own factors, minimum and z-loss; without the balancing loss in the gradients."""
    peer, moe = make(sizes, dtype, presets.st_moe, balance_loss_coef=0.0)
    moe.balance = replace(moe.balance, weight=0.0)
    x, direction = sizes.inputs(dtype)
    ours = step(moe, x, direction)
    assert ours.losses["load_balancing_loss"] > 0
    ours.losses["load_balancing_loss"] = balance_after_drop(moe, x)
    assert_agree(ours, peer_step(peer, x, direction), sizes)
    assert_drops(ours, 2, sizes)


@pytest.mark.parametrize("preset", [presets.st_moe, presets.gshard], ids=lambda p: p.name)
@pytest.mark.parametrize(("sizes", "dtype"), CASES, ids=str)
def test_losses(sizes: Sizes, dtype: torch.dtype, preset: presets.Preset) -> None:
    """With its own coefficients, and room for all, where its balancing loss counts as ours does."""
    peer, moe = make(sizes, dtype, preset, capacity_factor_train=float(sizes.E))
    moe.capacity = None
    if preset is presets.gshard:
        peer.router_z_loss_coef = 0.0
    x, direction = sizes.inputs(dtype)
    ours, expected = step(moe, x, direction), peer_step(peer, x, direction)
    if preset is presets.gshard:
        del expected.losses["router_z_loss"]
    assert_agree(ours, expected, sizes)
    assert ours.kept.sum() == 2 * sizes.T


@pytest.mark.parametrize(("sizes", "dtype"), CASES, ids=str)
def test_st_moe_in_evaluation(sizes: Sizes, dtype: torch.dtype) -> None:
    """It has no losses then; capacity and output are compared."""
    peer, moe = make(sizes, dtype, presets.st_moe)
    x, _ = sizes.inputs(dtype)
    y = moe.eval()(x).hidden_states.detach()
    expected = peer.eval()(x.unsqueeze(0)).outputs.squeeze(0).detach()
    assert_close(y, expected, tolerance(expected, n=sizes.longest_sum, wide=dtype, stored=dtype))


@pytest.mark.parametrize("top_k", [3, 4])
def test_st_moe_of_more_experts(top_k: int) -> None:
    sizes, dtype = CASES[1]
    capacity = replace(presets.st_moe.capacity, factor=Fraction(5, 4) / top_k)
    balance = replace(presets.st_moe.balance, weight=0.0)
    peer, moe = make(
        sizes,
        dtype,
        replace(presets.st_moe, top_k=top_k, capacity=capacity, balance=balance),
        gating_top_n=top_k,
        balance_loss_coef=0.0,
    )
    x, direction = sizes.inputs(dtype)
    ours = step(moe, x, direction)
    ours.losses["load_balancing_loss"] = balance_after_drop(moe, x)
    assert_agree(ours, peer_step(peer, x, direction), sizes)
    assert_drops(ours, top_k, sizes)


@pytest.mark.parametrize(("sizes", "dtype"), CASES[:2], ids=str)
def test_gshard(sizes: Sizes, dtype: torch.dtype) -> None:
    """GShard's gating is the same code with a capacity of 2 T / E and without a z-loss."""
    peer, moe = make(
        *(sizes, dtype, presets.gshard),
        capacity_factor_train=2.0,
        router_z_loss_coef=0.0,
        balance_loss_coef=0.0,
    )
    moe.balance = replace(moe.balance, weight=0.0)
    x, direction = sizes.inputs(dtype)
    ours, expected = step(moe, x, direction), peer_step(peer, x, direction)
    ours.losses["load_balancing_loss"] = balance_after_drop(moe, x)
    del expected.losses["router_z_loss"]
    assert_agree(ours, expected, sizes)
    assert_drops(ours, 2, sizes)


def test_a_group_is_a_call() -> None:
    """Two sequences there are two calls here, their losses averaged."""
    sizes, dtype = CASES[0]
    peer, moe = make(sizes, dtype, presets.st_moe, balance_loss_coef=0.0)
    moe.balance = replace(moe.balance, weight=0.0)
    x = torch.stack([sizes.inputs(dtype)[0] for _ in range(2)])
    outputs = [moe(sequence) for sequence in x]
    y = torch.stack([output.hidden_states for output in outputs]).detach()
    aux_loss = torch.stack([output.aux_loss for output in outputs]).mean().detach()
    expected = peer(x)
    for actual, wanted in ((y, expected.outputs), (aux_loss, expected.total_aux_loss)):
        atol = tolerance(wanted.detach(), n=sizes.longest_sum, wide=dtype, stored=dtype)
        assert_close(actual, wanted.detach(), atol)
