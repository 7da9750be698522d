"""The layer behaves as torch modules do: life cycle, compile, autocast, checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from copies import by_pickle, load_state
from float_types import AUTOCAST
from plain_moe import gradients, tensors_of
from torchmoe.nn import Balance, Capacity, Gate, MoE, Router, WithAttachedLoss

H, INNER, E, K, T = 6, 7, 5, 2, 23


def make(**options: object) -> MoE:
    """A layer with everything that has parameters, buffers or noise."""
    dtype, device = options.pop("dtype", None), options.pop("device", None)
    return MoE(
        H,
        INNER,
        E,
        K,
        bias=True,
        gate=Gate(estimator="straight_through"),
        capacity=Capacity(1.1),
        balance=Balance(z_loss_weight=0.01),
        router=Router(
            H,
            E,
            bias=True,
            input_jitter=0.1,
            logit_noise=0.5,
            usage_scaling=True,
            dtype=dtype,
            device=device,
        ),
        device=device,
        dtype=dtype,
        **options,
    )


def check_same(one: MoE, other: MoE) -> None:
    x = torch.randn(T, H)
    outputs = []
    for moe in (one, other):
        torch.manual_seed(3)
        outputs.append(moe(x))
    assert torch.equal(outputs[0].hidden_states, outputs[1].hidden_states)
    assert torch.equal(outputs[0].aux_loss, outputs[1].aux_loss)


def by_state_dict(moe: MoE) -> MoE:
    return load_state(make(), moe)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_state_dict])
def test_copies_are_the_same_layer_and_share_nothing(copied: Callable[[MoE], MoE]) -> None:
    moe = make()
    moe.update(moe(torch.randn(T, H)).routing)
    other = copied(moe)
    assert list(other.state_dict()) == list(moe.state_dict())
    check_same(moe, other)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert not torch.equal(other.router.weight, moe.router.weight)


def test_state_dict_names() -> None:
    assert set(make().state_dict()) == {
        "router.weight",
        "router.bias",
        "router.usage",
        "experts.gate_up_proj",
        "experts.gate_up_proj_bias",
        "experts.down_proj",
        "experts.down_proj_bias",
    }
    assert set(MoE(H, INNER, E, K, activation="gelu").state_dict()) == {
        "router.weight",
        "experts.up_proj",
        "experts.down_proj",
    }


def test_device_and_dtype_arguments() -> None:
    moe = make(device="meta", dtype=torch.bfloat16)
    assert all(parameter.is_meta for parameter in moe.parameters())
    assert all(parameter.dtype == torch.bfloat16 for parameter in moe.parameters())
    assert moe.router.usage.is_meta
    assert moe.router.usage.dtype == torch.float32


def test_meta_device_to_empty_reset_parameters() -> None:
    with torch.device("meta"):
        moe = make()
    moe = moe.to_empty(device="cpu")
    for tensor in moe.state_dict().values():
        tensor.fill_(torch.nan)
    torch.manual_seed(5)
    moe.reset_parameters()
    torch.manual_seed(5)
    fresh = make()
    fresh.reset_parameters()  # the parts are drawn one by one in construction, then once more
    torch.manual_seed(5)
    fresh.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in moe.state_dict().values())
    assert_close(moe.state_dict(), fresh.state_dict(), rtol=0, atol=0)
    check_same(moe, fresh)


def test_the_meta_device_runs_too() -> None:
    output = make(device="meta")(torch.empty(T, H, device="meta"))
    assert output.hidden_states.shape == (T, H)
    assert output.routing.indices.shape == (T, K)


def test_usage_stays_wide_in_a_narrow_module() -> None:
    moe = make()
    moe.update(moe(torch.randn(T, H)).routing)
    usage = moe.router.usage.clone()
    moe.bfloat16()
    assert moe.router.weight.dtype == torch.bfloat16
    assert torch.equal(moe.router.usage, usage)
    assert moe.double().router.usage.dtype == torch.float64


def test_extra_repr() -> None:
    text = repr(make())
    for part in (
        "hidden_size=6, num_experts=5, top_k=2",
        "capacity=Capacity(factor=1.1",
        "z_loss_weight=0.01",
        "input_jitter=0.1, logit_noise=0.5, usage_scaling=True",
        "StraightThrough(score_function='softmax', normalize='topk')",
        "intermediate_size=7, num_experts=5, activation='swiglu', bias=True",
    ):
        assert part in text
    assert "experts=<function" in repr(MoE(H, None, E, K, experts=lambda x, i, w: x))


def test_forward_changes_no_buffer_and_backward_neither() -> None:
    moe = make()
    before = copy.deepcopy(moe.state_dict())
    output = moe(torch.randn(T, H))
    (output.hidden_states.sum() + output.aux_loss).backward()
    assert_close(moe.state_dict(), before, rtol=0, atol=0)
    moe.update(output.routing)
    assert not torch.equal(moe.router.usage, before["router.usage"])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    moe = make()
    x = torch.randn(T, H, requires_grad=True)
    calls = []
    moe.router.register_forward_hook(lambda *_: calls.append(1))
    seen = []
    for run in (moe, lambda x: checkpoint(moe, x, use_reentrant=use_reentrant)):
        moe.zero_grad()
        x.grad = None
        before = moe.router.usage.clone()
        torch.manual_seed(11)
        hidden_states, aux_loss, routing = run(x)
        (hidden_states.square().sum() + aux_loss).backward()
        assert torch.equal(moe.router.usage, before)
        seen.append([hidden_states, aux_loss, *gradients(moe).values(), x.grad.clone()])
        counts = routing.tokens_per_expert
        assert counts.sum() == T * K
    assert len(calls) == 3  # the recomputation did happen
    assert_close(seen[0], seen[1], rtol=0, atol=0)
    moe.update(routing)
    assert_close(moe.router.usage, 0.99 * before + 0.01 * counts / (T * K))


def test_gradient_accumulation() -> None:
    # Without capacity or noise, and with a task loss that adds up, micro-batches are one batch.
    x = torch.randn(4, T, H, dtype=torch.float64)
    together = MoE(
        H,
        INNER,
        E,
        K,
        balance=Balance(weight=0.0),
        router=Router(H, E, usage_scaling=True, dtype=torch.float64),
        dtype=torch.float64,
    )
    parts = copy.deepcopy(together)
    output = together(x)
    (output.hidden_states.square().sum() + output.aux_loss).backward()
    routings = []
    for micro_batch in x:
        output_of_part = parts(micro_batch)
        (output_of_part.hidden_states.square().sum() + output_of_part.aux_loss).backward()
        routings.append(output_of_part.routing)
    assert_close(gradients(parts), gradients(together))
    parts.update(routings)
    together.update(output.routing)
    assert not torch.equal(together.router.usage, torch.full((E,), 1 / E, dtype=torch.float64))
    assert_close(parts.router.usage, together.router.usage)


@pytest.mark.parametrize("token_mask", [False, True])
def test_compile_once_for_all_token_counts(token_mask: bool) -> None:
    moe = MoE(
        H, INNER, E, K, capacity=Capacity(1.1, order="token"), balance=Balance(z_loss_weight=0.01)
    )
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (11, 17, 40, 13):
        x = torch.randn(num_tokens, H)
        mask = torch.rand(num_tokens) > 0.3 if token_mask else None
        seen = []
        for layer in (moe, compiled):
            moe.zero_grad()
            leaf = x.clone().requires_grad_()
            output = layer(leaf, token_mask=mask)
            (output.hidden_states.square().sum() + output.aux_loss).backward()
            seen.append(
                {"y": output.hidden_states, "aux_loss": output.aux_loss, "x": leaf.grad}
                | tensors_of(output.routing)
                | gradients(moe)
            )
        assert_close(seen[0], seen[1])
    assert counter.frame_count == 1


def test_compile_once_for_all_coefficients() -> None:
    layer = WithAttachedLoss(MoE(H, INNER, E, K, balance=Balance(z_loss_weight=0.01)))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    x = torch.randn(T, H)
    for factor in (1.0, 0.5, 0.25):
        layer.scale = 1024.0 * factor
        layer.moe.balance = Balance(0.1 * factor, z_loss_weight=0.1 * factor)
        seen = []
        for run in (layer, compiled):
            layer.zero_grad()
            run(x).square().sum().backward()
            seen.append(gradients(layer))
        assert_close(seen[0], seen[1])
    assert counter.frame_count == 1


def test_compile_with_noise_usage_and_attached_loss() -> None:
    layer = WithAttachedLoss(make())
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    seen = []
    x = torch.randn(T, H)
    for run in (layer, compiled):
        layer.zero_grad()
        torch.manual_seed(2)
        y = run(x)
        y.square().sum().backward()
        seen.append([y, *gradients(layer).values()])
    assert_close(seen[0], seen[1])


@pytest.mark.parametrize("dtype", AUTOCAST)
def test_autocast(dtype: torch.dtype) -> None:
    moe = MoE(
        H, INNER, E, K, bias=True, capacity=Capacity(1.1), balance=Balance(z_loss_weight=0.01)
    )
    x = torch.randn(2, T, H, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        output = moe(x)
    (output.hidden_states.float().square().sum() + output.aux_loss).backward()
    assert output.hidden_states.dtype == dtype
    assert output.hidden_states.shape == x.shape
    assert output.aux_loss.dtype == torch.float32
    routing = output.routing
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    # Router, weights and losses are those of float32, bit for bit.
    plain = moe(x).routing
    for name, tensor in tensors_of(plain).items():
        assert torch.equal(tensor, tensors_of(routing)[name]), name
    for gradient in gradients(moe).values():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


def test_autocast_around_narrow_activations() -> None:
    moe = MoE(H, INNER, E, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = nn.Linear(H, H)(torch.randn(T, H))
        assert hidden.dtype == torch.bfloat16
        output = moe(hidden)
    assert output.hidden_states.dtype == torch.bfloat16
    output.hidden_states.float().sum().backward()
    assert moe.router.weight.grad.dtype == torch.float32


def test_inference_mode() -> None:
    moe = make().eval()
    x = torch.randn(T, H)
    expected = moe(x)
    with torch.inference_mode():
        output = moe(x)
    assert torch.equal(output.hidden_states, expected.hidden_states)
    assert not output.aux_loss.requires_grad


def test_two_runs_and_other_thread_counts_give_the_same_bits() -> None:
    moe = MoE(64, 96, 8, 2, capacity=Capacity(1.1))
    x = torch.randn(512, 64)
    seen: list[list[Tensor]] = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        moe.zero_grad()
        output = moe(x)
        (output.hidden_states.sum() + output.aux_loss).backward()
        seen.append([output.hidden_states, output.aux_loss, *gradients(moe).values()])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))
