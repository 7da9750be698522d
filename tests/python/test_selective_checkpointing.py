"""The ops that a policy of selective activation checkpointing sees, and what it saves with them."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from plain_moe import gradients
from selectively import selectively
from torchmoe.nn import MoE

T, H, INNER, E, K = 7, 6, 5, 4, 2
ROUTER = 2 * T * H * E
EXPERTS = 6 * T * K * H * INNER


def test_every_differentiable_op_has_its_checklist() -> None:
    differentiable = {
        name.removeprefix("torchmoe::")
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("Autograd")
        if name.startswith("torchmoe::") and not name.startswith("torchmoe::_")
    }
    texts = (path.read_text() for path in (Path(__file__).parent / "ops").glob("test_*.py"))
    checked = {
        name
        for text in texts
        if "(DifferentiableOpTests)" in text
        for name in re.findall(r'OpCase\(\s*name="(\w+)"', text)
    }
    assert differentiable == checked


def test_saving_the_experts_leaves_the_rest_to_be_computed_again() -> None:
    layer = MoE(H, INNER, E, K)
    x = torch.randn(T, H, requires_grad=True)

    def hidden_states(x: Tensor) -> Tensor:
        return layer(x).hidden_states

    def flops(save: tuple[object, ...]) -> int:
        layer.zero_grad()
        x.grad = None
        with FlopCounterMode(display=False) as counter:
            selectively(hidden_states, x, save=save).square().sum().backward()
        return counter.get_total_flops()

    hidden_states(x).square().sum().backward()
    expected = [x.grad, gradients(layer)]
    step = 3 * (ROUTER + EXPERTS)
    assert flops(save=()) == step + ROUTER + EXPERTS
    assert_close([x.grad, gradients(layer)], expected, rtol=0, atol=0)
    assert flops(save=(torch.ops.torchmoe._expert_mlp.default,)) == step + ROUTER
    assert_close([x.grad, gradients(layer)], expected, rtol=0, atol=0)
    # The public op is not what a policy is asked about where there are gradients.
    assert flops(save=(torch.ops.torchmoe.expert_mlp.default,)) == step + ROUTER + EXPERTS


def test_a_compiled_layer_gives_its_policy_the_same_names() -> None:
    layer = nn.ModuleList([MoE(H, INNER, E, K)])
    x = torch.randn(T, H, requires_grad=True)
    seen: list[str] = []

    def policy(_context: object, op: torch._ops.OpOverload, *_: object, **__: object) -> bool:
        seen.append(str(op))
        return op is torch.ops.torchmoe._expert_mlp.default

    def step(x: Tensor) -> Tensor:
        return checkpoint(
            lambda x: layer[0](x).hidden_states,
            x,
            use_reentrant=False,
            context_fn=partial(create_selective_checkpoint_contexts, policy),
        )

    step(x).square().sum().backward()
    expected = [x.grad, gradients(layer)]
    layer.zero_grad()
    x.grad = None
    seen.clear()
    torch.compile(step, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    assert_close([x.grad, gradients(layer)], expected)
    assert "torchmoe._expert_mlp.default" in seen
    assert "torchmoe.expert_mlp.default" not in seen
