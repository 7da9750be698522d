"""The preset deepspeed against DeepSpeed's own layer, in one process and in float32, its only type.

Its random token selection is given the numbers that our layer draws; the second expert of two is
not sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peers.comparison import (
    Result,
    Sizes,
    assert_agree,
    assert_drops,
    copy_router,
    gradients,
    randomize,
    step,
    table,
)
from torchmoe import ops, presets
from torchmoe.nn import Balance, ExpertList, Gate, MoE

sharded_moe = pytest.importorskip("deepspeed.moe.sharded_moe")
deepspeed_layer = pytest.importorskip("deepspeed.moe.layer")

F32 = torch.float32
COEFFICIENT = 0.01
SIZES = [Sizes(32, 8, 12, 4), Sizes(100, 16, 24, 8), Sizes(32, 8, 12, 16)]


class Expert(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.up = nn.Linear(sizes.H, sizes.I)
        self.down = nn.Linear(sizes.I, sizes.H)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


@pytest.fixture
def draws() -> Iterator[dict[torch.device, Any]]:
    """DeepSpeed's source of random numbers for token selection, to be replaced."""
    kept = dict(sharded_moe.exp_selection_uniform_map)
    yield sharded_moe.exp_selection_uniform_map
    sharded_moe.exp_selection_uniform_map.clear()
    sharded_moe.exp_selection_uniform_map.update(kept)


def make(sizes: Sizes, top_k: int, **options: Any) -> nn.Module:
    options = {"top2_2nd_expert_sampling": False} | options
    layer = deepspeed_layer.MoE(sizes.H, Expert(sizes), sizes.E, k=top_k, **options)
    randomize([layer])
    return layer.deepspeed_moe


def ours_like(layer: nn.Module, sizes: Sizes, **changes: Any) -> MoE:
    experts = ExpertList(deepcopy(list(layer.experts.deepspeed_experts)))
    moe = presets.deepspeed.layer(sizes.H, None, sizes.E, experts=experts, **changes)
    assert moe.balance.weight == COEFFICIENT
    copy_router(moe, layer.gate.wg.weight)
    return moe


def peer_step(layer: nn.Module, x: Tensor, direction: Tensor) -> Result:
    x = x.clone().requires_grad_()
    y = layer(x, None)
    ((y * direction).sum() + COEFFICIENT * layer.l_aux).backward()
    # Slots as [K, T]; one that is dropped has the id -1.
    _, _, num_experts, indices, _, weights, _ = layer.gate(x, None, True)
    kept, weights = table(indices.t().long(), weights.t(), num_experts)
    found = gradients(x, layer.gate.wg.weight, layer.experts)
    return Result(
        kept=kept,
        weights=weights,
        y=y.detach(),
        losses={"load_balancing_loss": layer.l_aux.detach()},
        gradients={name.replace("deepspeed_experts", "experts"): g for name, g in found.items()},
    )


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_one_expert_and_random_tokens(sizes: Sizes, draws: dict[torch.device, Any]) -> None:
    """The preset as it is, which has DeepSpeed's defaults."""
    layer = make(sizes, 1)
    moe = ours_like(layer, sizes)
    x, direction = sizes.inputs(F32)
    torch.manual_seed(7)
    priority = torch.rand(sizes.T, 1)  # as the layer draws it
    draws[x.device] = lambda shape: priority.expand(shape)
    torch.manual_seed(7)
    ours = step(moe, x, direction)
    assert_agree(ours, peer_step(layer, x, direction), sizes)
    assert_drops(ours, 1, sizes)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_two_experts(sizes: Sizes) -> None:
    layer = make(sizes, 2)
    capacity = replace(presets.deepspeed.capacity, priority=None)
    moe = ours_like(
        layer, sizes, top_k=2, capacity=capacity, balance=Balance(fraction_choices="first")
    )
    x, direction = sizes.inputs(F32)
    ours = step(moe, x, direction)
    assert_agree(ours, peer_step(layer, x, direction), sizes)
    assert_drops(ours, 2, sizes)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("top_k", [3])
def test_more_experts_by_position(
    sizes: Sizes, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drop policy that its layer has no argument for."""
    by_position = sharded_moe.topkgating

    def topkgating(*arguments: Any, **options: Any) -> Any:
        return by_position(*arguments, **(options | {"drop_policy": "position"}))

    monkeypatch.setattr(sharded_moe, "topkgating", topkgating)
    layer = make(sizes, top_k)
    capacity = replace(presets.deepspeed.capacity, priority=None, order="token")
    moe = ours_like(layer, sizes, top_k=top_k, capacity=capacity)
    x, direction = sizes.inputs(F32)
    ours = step(moe, x, direction)
    assert_agree(ours, peer_step(layer, x, direction), sizes)
    assert_drops(ours, top_k, sizes)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_more_experts_by_probability(sizes: Sizes) -> None:
    """Priority "weight" is DeepSpeed's ranking where weights are probabilities: not normalised.

    DeepSpeed normalises them after dropping, which is done by hand here.
    """
    layer = make(sizes, 3)
    capacity = replace(presets.deepspeed.capacity, priority="weight")
    moe = ours_like(layer, sizes, top_k=3, capacity=capacity, gate=Gate(normalize="none"))
    x, direction = sizes.inputs(F32)
    routing = moe(x).routing
    weights = ops.gate_weights(
        routing.logits,
        routing.indices,
        score_function="softmax",
        normalize="topk",
        estimator="exact",
    )
    kept, weights = table(routing.indices, weights, sizes.E)
    peer = peer_step(layer, x, direction)
    ours = replace(
        peer, kept=kept, weights=weights, losses={n: v.detach() for n, v in routing.losses.items()}
    )
    assert_agree(ours, peer, sizes)
    assert_drops(ours, 3, sizes)
