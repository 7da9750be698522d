"""The ops that a policy of selective activation checkpointing sees, and what it saves with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from plain_moe import gradients
from torchmoe import ops
from torchmoe.nn import MoE

T, H, INNER, E, K = 7, 6, 5, 4, 2
ROUTER = 2 * T * H * E
EXPERTS = 6 * T * K * H * INNER
INDICES = torch.arange(T * K).reshape(T, K) % E
PLAN = ops.dispatch_plan(INDICES, E)

# For each differentiable op of the library: how it is called, and the tensors it is called with.
CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "router_logits": (ops.router_logits, [(T, H), (E, H), (E,)]),
    "gate_weights": (
        lambda logits: ops.gate_weights(
            logits, INDICES, score_function="softmax", normalize="topk", estimator="exact"
        ),
        [(T, E)],
    ),
    "permute": (lambda x: ops.permute(x, PLAN), [(T, H)]),
    "unpermute": (lambda rows, weights: ops.unpermute(rows, weights, PLAN), [(T * K, H), (T, K)]),
    "grouped_linear": (
        lambda rows, weight, bias: ops.grouped_linear(rows, weight, bias, PLAN.expert_offsets),
        [(T * K, H), (E, INNER, H), (E, INNER)],
    ),
    "sum_by_expert": (lambda rows: ops.sum_by_expert(rows, PLAN.expert_offsets), [(T * K, H)]),
    "expert_mlp": (
        lambda x, weights, w_in, w_out: ops.expert_mlp(
            x, INDICES, weights, w_in, None, w_out, None, "swiglu"
        ),
        [(T, H), (T, K), (E, 2 * INNER, H), (E, H, INNER)],
    ),
    "load_balancing_loss": (
        lambda logits: ops.load_balancing_loss(
            logits, torch.full((E,), 1 / E), score_function="softmax"
        ),
        [(T, E)],
    ),
    "mean_over_tokens": (ops.mean_over_tokens, [(T, E)]),
    "router_z_loss": (ops.router_z_loss, [(T, E)]),
    "scale_gradient": (lambda x: ops.scale_gradient(x, torch.ones(H)), [(T, H)]),
    "attach_dense_gradient": (
        lambda y, probs, x, w_in, w_out: ops.attach_dense_gradient(
            y, probs, x, w_in, None, w_out, None, "swiglu"
        ),
        [(T, H), (T, E), (T, H), (E, 2 * INNER, H), (E, H, INNER)],
    ),
    "attach_loss": (lambda x, loss: ops.attach_loss(x, loss.sum()), [(T, H), (1,)]),
}
INSTEAD = {"expert_mlp": ["dispatch_plan", "_expert_mlp"]}


def selectively(
    function: Callable[..., Tensor],
    *args: Tensor,
    save: tuple[object, ...] = (),
    seen: list[str] | None = None,
) -> Tensor:
    """The function under a policy that saves the ops `save` and notes what it was asked about."""

    def policy(
        context: SelectiveCheckpointContext, op: torch._ops.OpOverload, *_: object, **__: object
    ) -> CheckpointPolicy:
        if seen is not None and op.namespace == "torchmoe" and not context.is_recompute:
            seen.append(op._schema.name.removeprefix("torchmoe::"))
        return CheckpointPolicy.MUST_SAVE if op in save else CheckpointPolicy.PREFER_RECOMPUTE

    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, policy),
    )


def test_the_cases_are_the_differentiable_ops() -> None:
    differentiable = {
        name.removeprefix("torchmoe::")
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("Autograd")
        if name.startswith("torchmoe::") and not name.startswith("torchmoe::_")
    }
    assert differentiable == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_what_a_policy_sees(name: str) -> None:
    function, shapes = CASES[name]
    seen: list[str] = []
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    selectively(function, *inputs, seen=seen).sum().backward()
    assert seen == INSTEAD.get(name, [name])
    if name in INSTEAD:
        seen.clear()
        selectively(function, *(tensor.detach() for tensor in inputs), seen=seen)
        assert seen == [name]


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
