"""Presets against Hugging Face Transformers: Mixtral, Switch Transformers, DeepSeek-V3.

Transformers computes routing in float32 whatever the type of the model, so all is float32 here.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softmax

from op_case import assert_close, tolerance
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
from torchmoe import expert_capacity, presets
from torchmoe.nn import Balance, ExpertList, MoE

pytest.importorskip("transformers")

from transformers import DeepseekV3Config, MixtralConfig, SwitchTransformersConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.switch_transformers import modeling_switch_transformers as switch

F32 = torch.float32
SIZES = [Sizes(32, 8, 12, 16), Sizes(100, 16, 24, 16), Sizes(256, 32, 16, 32)]


def mixtral_block(sizes: Sizes, top_k: int) -> nn.Module:
    config = MixtralConfig(
        hidden_size=sizes.H,
        intermediate_size=sizes.I,
        num_local_experts=sizes.E,
        num_experts_per_tok=top_k,
        hidden_act="silu",
    )
    config._experts_implementation = "eager"
    assert config.router_jitter_noise == presets.mixtral_hf.input_jitter
    coefficient = config.router_aux_loss_coef
    assert presets.mixtral_hf.balance.weight == coefficient * presets.mixtral_hf.top_k
    block = mixtral.MixtralSparseMoeBlock(config)
    randomize([block])
    return block


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_mixtral(sizes: Sizes, top_k: int) -> None:
    coefficient = 0.001
    block = mixtral_block(sizes, top_k)
    moe = presets.mixtral_hf.layer(
        sizes.H, sizes.I, sizes.E, top_k=top_k, balance=Balance(weight=coefficient * top_k)
    )
    copy_router(moe, block.gate.weight)
    moe.experts.load_state_dict(block.experts.state_dict())
    x, direction = sizes.inputs(F32)
    ours = step(moe, x, direction)

    x = x.clone().requires_grad_()
    y = block(x.unsqueeze(0)).squeeze(0)
    logits, weights, indices = block.gate(x)
    # One layer: with more, Transformers pools their tokens, and we form a loss of each.
    balance = mixtral.load_balancing_loss_func((logits,), sizes.E, top_k)
    ((y * direction).sum() + coefficient * balance).backward()
    kept, weights = table(indices, weights, sizes.E)
    peer = Result(
        kept=kept,
        weights=weights,
        y=y.detach(),
        losses={"load_balancing_loss": balance.detach() / top_k},
        gradients=gradients(x, block.gate.weight, block.experts),
    )
    assert_agree(ours, peer, sizes)


def test_mixtral_balance_skips_masked_tokens() -> None:
    sizes = SIZES[1]
    block = mixtral_block(sizes, 2)
    moe = presets.mixtral_hf.layer(sizes.H, sizes.I, sizes.E)
    copy_router(moe, block.gate.weight)
    x, _ = sizes.inputs(F32)
    token_mask = torch.rand(4, sizes.T // 4) < 0.7
    output = moe(x.view(4, -1, sizes.H), token_mask=token_mask)
    logits, _, _ = block.gate(x)
    balance = mixtral.load_balancing_loss_func((logits,), sizes.E, 2, token_mask.long())
    expected = 0.001 * balance
    atol = tolerance(expected, n=sizes.longest_sum, wide=F32, stored=F32)
    assert_close(output.aux_loss.detach(), expected.detach(), 0.001 * atol)


def switch_layer(sizes: Sizes, **options: Any) -> nn.Module:
    config = SwitchTransformersConfig(
        d_model=sizes.H,
        d_ff=sizes.I,
        num_experts=sizes.E,
        # A fixed number there; ours follows from T, E and the factor.
        expert_capacity=expert_capacity(sizes.T, sizes.E, 1, 1.25, 4, rounding="down"),
        dropout_rate=0.0,
        **options,
    )
    layer = switch.SwitchTransformersSparseMLP(config)
    randomize([layer])
    return layer


def switch_moe(sizes: Sizes, layer: nn.Module, **changes: Any) -> MoE:
    experts = [deepcopy(layer.experts[f"expert_{i}"]) for i in range(sizes.E)]
    moe = presets.switch.layer(sizes.H, None, sizes.E, experts=ExpertList(experts), **changes)
    copy_router(moe, layer.router.classifier.weight)
    return moe


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_switch(sizes: Sizes) -> None:
    """One sequence, since capacity is per sequence there; without jitter, see below."""
    layer = switch_layer(sizes, router_jitter_noise=0.0)
    moe = switch_moe(sizes, layer, input_jitter=0.0, balance=Balance(z_loss_weight=0.001))
    x, direction = sizes.inputs(F32)
    ours = step(moe, x, direction)

    x = x.clone().requires_grad_()
    y = layer(x.unsqueeze(0)).squeeze(0)
    served, weights, logits = layer.router(x.unsqueeze(0))
    probs = softmax(logits, -1)
    balance = switch.load_balancing_loss_func(probs, logits.argmax(-1))
    z_loss = switch.router_z_loss_func(logits)
    ((y * direction).sum() + 0.01 * balance + 0.001 * z_loss).backward()
    kept = served.squeeze(0).bool()
    peer = Result(
        kept=kept,
        weights=(kept * weights.squeeze(0)).detach(),
        y=y.detach(),
        losses={"load_balancing_loss": balance.detach(), "router_z_loss": z_loss.detach()},
        gradients=rename(gradients(x, layer.router.classifier.weight, layer.experts)),
    )
    assert_agree(ours, peer, sizes)
    assert_drops(ours, 1, sizes)


def rename(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".expert_", ".experts."): grad for name, grad in found.items()}


def test_switch_jitters_the_same_logits() -> None:
    """Of the router alone: in float32 Transformers changes the experts' input in place too."""
    sizes = SIZES[1]
    layer = switch_layer(sizes)
    assert layer.router.jitter_noise == presets.switch.input_jitter
    moe = switch_moe(sizes, layer)
    x, _ = sizes.inputs(F32)
    torch.manual_seed(3)
    logits = moe(x).routing.logits.detach()
    torch.manual_seed(3)
    _, _, expected = layer.router(x.clone().unsqueeze(0))
    atol = tolerance(expected, n=sizes.H, wide=F32, stored=F32)
    assert_close(logits, expected.squeeze(0).detach(), atol)
    assert (logits - x @ moe.router.weight.detach().t()).abs().max() > 10 * atol


# The first are those of the preset and of the model.
@pytest.mark.parametrize(
    ("groups", "top_groups", "top_k"), [(8, 4, 8), (4, 2, 3), (1, 1, 2)], ids=str
)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_deepseek_v3(sizes: Sizes, groups: int, top_groups: int, top_k: int) -> None:
    preset = presets.deepseek_v3
    config = DeepseekV3Config(
        hidden_size=sizes.H,
        moe_intermediate_size=sizes.I,
        n_routed_experts=sizes.E,
        n_group=groups,
        topk_group=top_groups,
        num_experts_per_tok=top_k,
        hidden_act="silu",
    )
    config._experts_implementation = "eager"
    assert config.routed_scaling_factor == preset.routed_scaling_factor
    assert config.norm_topk_prob
    block = DeepseekV3MoE(config)
    randomize([block])
    # Biases that decide, of both signs, and negative ones in a whole group.
    block.gate.e_score_correction_bias.normal_(std=0.3)
    block.gate.e_score_correction_bias[: sizes.E // groups] -= 1.0
    moe = preset.layer(
        sizes.H,
        sizes.I,
        sizes.E,
        top_k=top_k,
        gate=replace(preset.gate, num_groups=groups, top_groups=top_groups),
        balance=replace(preset.balance, weight=0.0),  # Transformers has no loss for it
    )
    assert config.n_shared_experts == preset.num_shared_experts
    theirs, shared = block.shared_experts, moe.shared_experts.experts
    with torch.no_grad():
        gate_up = torch.cat([theirs.gate_proj.weight, theirs.up_proj.weight])
        assert shared.gate_up_proj[0].shape == gate_up.shape
        assert shared.down_proj[0].shape == theirs.down_proj.weight.shape
        shared.gate_up_proj[0] = gate_up
        shared.down_proj[0] = theirs.down_proj.weight
    copy_router(moe, block.gate.weight)
    moe.experts.load_state_dict(block.experts.state_dict())
    with torch.no_grad():
        moe.selection_bias.copy_(block.gate.e_score_correction_bias)
    x, direction = sizes.inputs(F32)
    ours = step(moe, x, direction)

    x = x.clone().requires_grad_()
    y = block(x.unsqueeze(0)).squeeze(0)
    (y * direction).sum().backward()
    _, weights, indices = block.gate(x)
    kept, weights = table(indices, weights / config.routed_scaling_factor, sizes.E)
    peer = Result(
        kept=kept,
        weights=weights,
        y=y.detach(),
        losses={},
        gradients=gradients(x, block.gate.weight, block.experts),
    )
    ours.losses.clear()
    assert_agree(ours, peer, sizes)
    gate_up = torch.cat([theirs.gate_proj.weight.grad, theirs.up_proj.weight.grad])
    for found, expected in (
        (shared.gate_up_proj.grad[0], gate_up),
        (shared.down_proj.grad[0], theirs.down_proj.weight.grad),
    ):
        atol = tolerance(expected, n=sizes.longest_sum, wide=F32, stored=F32)
        assert_close(found, expected, atol)
        assert expected.abs().max() > 0
