"""Shared experts and the routed scaling factor: y = factor * routed + shared(x)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from compiled_once import check_compiled_once
from float_types import AUTOCAST
from plain_moe import gradients, plain_balance, plain_moe
from torchmoe.nn import Capacity, Experts, Gate, MoE, SharedExperts, WithAttachedLoss

H, INNER, E, K, T = 6, 7, 5, 2, 23
F64 = torch.float64


def shared(dtype: torch.dtype = F64) -> nn.Module:
    return nn.Sequential(nn.Linear(H, 9, dtype=dtype), nn.SiLU(), nn.Linear(9, H, dtype=dtype))


def make(factor: float = 2.5, dtype: torch.dtype = F64, **options: Any) -> MoE:
    return MoE(
        H,
        INNER,
        E,
        K,
        routed_scaling_factor=factor,
        dtype=dtype,
        **({"shared_experts": shared(dtype)} | options),
    )


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("capacity", [None, Capacity(0.7)])
def test_equals_plain_pytorch(factor: float, capacity: Capacity | None) -> None:
    moe = make(factor, capacity=capacity)
    x = torch.randn(T, H, dtype=F64, requires_grad=True)
    direction = torch.randn(T, H, dtype=F64)
    output = moe(x)
    ((output.hidden_states * direction).sum() + output.aux_loss).backward()
    got = gradients(moe) | {"x": x.grad}
    moe.zero_grad()
    x.grad = None

    kept = output.routing.indices >= 0
    routed, logits = plain_moe(moe, x, kept=kept, score_function="softmax", normalize="topk")
    y = factor * routed + moe.shared_experts(x)
    aux_loss = 0.01 * plain_balance(logits, output.routing.tokens_per_expert, K)
    ((y * direction).sum() + aux_loss).backward()
    assert_close(output.hidden_states, y)
    assert_close(got, gradients(moe) | {"x": x.grad})
    # The factor is no part of weights, counts and losses.
    assert_close(output.aux_loss, aux_loss)
    if capacity is None:
        assert_close(output.routing.weights.sum(1), torch.ones(T, dtype=F64))


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_every_token_gets_the_shared_experts(factor: float) -> None:
    """Also one whose slots are all dropped."""
    moe = make(factor, capacity=Capacity(0))
    x = torch.randn(T, H, dtype=F64)
    output = moe(x)
    assert (output.routing.indices == -1).all()
    assert_close(output.hidden_states, moe.shared_experts(x))


def test_the_factor_without_shared_experts() -> None:
    moe = make(2.5, shared_experts=None)
    x = torch.randn(T, H, dtype=F64)
    scaled = moe(x).hidden_states
    moe.routed_scaling_factor = 1.0
    assert_close(scaled, 2.5 * moe(x).hidden_states)
    moe.routed_scaling_factor = 0.0
    assert (moe(x).hidden_states == 0).all()
    assert moe.routed_scaling_factor == 0.0


def test_leading_dimensions() -> None:
    """Shared experts see [T, H] whatever the shape of x."""
    seen = []

    class Seen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.shape)
            return x

    moe = make(shared_experts=Seen())
    x = torch.randn(2, 3, 4, H, dtype=F64)
    assert moe(x).hidden_states.shape == x.shape
    assert moe(x[0, 0, 0]).hidden_states.shape == (H,)
    assert moe(x[:0]).hidden_states.shape == (0, 3, 4, H)
    assert seen == [(24, H), (1, H), (0, H)]


def test_masked_tokens_get_nothing_and_give_no_gradient() -> None:
    moe = make()
    x, mask = torch.randn(3, 8, H, dtype=F64), torch.rand(3, 8) > 0.4
    x[~mask] = torch.nan
    x.requires_grad_()
    output = moe(x, token_mask=mask)
    output.hidden_states.square().sum().backward()
    got = gradients(moe)
    assert (output.hidden_states[~mask] == 0).all()
    assert (x.grad[~mask] == 0).all()

    moe.zero_grad()
    counted = x.detach()[mask].requires_grad_()
    alone = moe(counted).hidden_states
    alone.square().sum().backward()
    assert_close(output.hidden_states[mask], alone)
    assert_close(x.grad[mask], counted.grad)
    assert_close(got, gradients(moe))

    moe.zero_grad()
    nothing = moe(x, token_mask=torch.zeros_like(mask))
    (nothing.hidden_states.sum() + nothing.aux_loss).backward()
    assert (nothing.hidden_states == 0).all()
    assert all((gradient == 0).all() for gradient in gradients(moe).values())


def test_a_shared_expert_may_be_a_stack_of_one() -> None:
    """Any module [T, H] -> [T, H], our own ops inside included."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Experts(H, 9, 1, dtype=F64)

        def forward(self, x: Tensor) -> Tensor:
            ids = torch.zeros(x.shape[0], 1, dtype=torch.int64)
            return self.experts(x, ids, torch.ones(x.shape[0], 1, dtype=x.dtype))

    moe = make(shared_experts=One())
    x = torch.randn(T, H, dtype=F64)
    routed = make(1.0, shared_experts=None)
    routed.load_state_dict(moe.state_dict(), strict=False)
    assert_close(moe(x).hidden_states, 2.5 * routed(x).hidden_states + moe.shared_experts(x))


@pytest.mark.parametrize("estimator", ["straight_through_dense", "default_vector"])
def test_with_estimators_that_combine_themselves(estimator: str) -> None:
    moe = make(gate=Gate(estimator=estimator, normalize="none"))
    moe.update(moe(torch.randn(T, H, dtype=F64)).routing)
    plain = copy.deepcopy(moe)
    plain.shared_experts, plain.routed_scaling_factor = None, 1.0
    x = torch.randn(T, H, dtype=F64)
    direction = torch.randn(T, H, dtype=F64)
    output = moe(x)
    (output.hidden_states * direction).sum().backward()
    expected = plain(x)
    (2.5 * expected.hidden_states * direction).sum().backward()
    assert_close(output.hidden_states, 2.5 * expected.hidden_states + moe.shared_experts(x))
    assert_close(moe.router.weight.grad, plain.router.weight.grad)
    # Statistics are of the experts, without the factor.
    assert_close(output.routing.statistics, expected.routing.statistics)


@pytest.mark.parametrize("dtype", AUTOCAST)
def test_autocast(dtype: torch.dtype) -> None:
    moe = make(dtype=torch.float32)
    x = torch.randn(T, H)
    with torch.autocast("cpu", dtype=dtype):
        output = moe(x)
    assert output.hidden_states.dtype == dtype
    output.hidden_states.float().square().sum().backward()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(moe).values())
    scale = moe(x).hidden_states.abs().max().item()
    atol = 16 * torch.finfo(dtype).eps * scale
    assert_close(output.hidden_states.float(), moe(x).hidden_states, rtol=0, atol=atol)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant: bool) -> None:
    moe = make(dtype=torch.float32)
    moe.shared_experts.append(nn.Dropout(0.5))
    x = torch.randn(T, H, requires_grad=True)
    seen = []
    for run in (moe, lambda x: checkpoint(moe, x, use_reentrant=use_reentrant)):
        moe.zero_grad()
        torch.manual_seed(3)
        y, aux_loss, _ = run(x)
        (y.square().sum() + aux_loss).backward()
        seen.append([y, aux_loss, *gradients(moe).values()])
    assert_close(seen[0], seen[1], rtol=0, atol=0)


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_compiles_once_for_all_token_counts(factor: float) -> None:
    check_compiled_once(make(factor, dtype=torch.float32), H)


def test_compiles_once_for_all_factors() -> None:
    moe = make(dtype=torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend=counter)
    x = torch.randn(T, H)
    for factor in (2.5, 0.5, 16.0):
        moe.routed_scaling_factor = factor
        assert_close(compiled(x).hidden_states, moe(x).hidden_states)
    assert counter.frame_count == 1


def test_with_attached_loss() -> None:
    moe = make()
    x = torch.randn(T, H, dtype=F64)
    output = moe(x)
    (output.hidden_states.square().sum() + output.aux_loss).backward()
    expected = gradients(moe)
    moe.zero_grad()
    WithAttachedLoss(moe)(x).square().sum().backward()
    assert_close(gradients(moe), expected)


def test_life_as_a_module() -> None:
    moe = make(shared_experts=nn.Linear(H, H, dtype=F64))
    assert {"shared_experts.weight", "shared_experts.bias"} < set(moe.state_dict())
    text = repr(moe)
    assert "routed_scaling_factor=2.5" in text
    assert "(shared_experts): Linear(in_features=6, out_features=6, bias=True)" in text
    plain = repr(make(1.0, shared_experts=None))
    assert "routed_scaling_factor" not in plain
    assert "(shared_experts): None" in plain
    other = copy.deepcopy(moe)
    x = torch.randn(T, H, dtype=F64)
    assert torch.equal(other(x).hidden_states, moe(x).hidden_states)
    assert other.routed_scaling_factor == 2.5


@pytest.mark.parametrize(
    "module",
    [lambda: nn.Linear(H, H), lambda: nn.Sequential(nn.Linear(H, 9), nn.Linear(9, H))],
    ids=["module", "modules_inside"],
)
def test_reset_parameters_reaches_the_shared_experts(module: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        moe = MoE(H, INNER, E, K, shared_experts=module())
    moe = moe.to_empty(device="cpu")
    for tensor in moe.state_dict().values():
        tensor.fill_(torch.nan)
    moe.reset_parameters()
    assert {name for name, p in moe.named_parameters() if p.isnan().any()} == set()


# --- errors -------------------------------------------------------------------------------------


class Narrow(nn.Module):
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda x: x[:, :1], r"\[23, 1\]"),  # would broadcast
        (lambda x: x[:1], r"\[1, 6\]"),
        (lambda x: x.unsqueeze(0), r"\[1, 23, 6\]"),
        (lambda x: torch.cat([x, x], 1), r"\[23, 12\]"),
    ],
)
def test_another_shape_is_refused(change: Callable[[Tensor], Tensor], got: str) -> None:
    moe = make(shared_experts=Narrow(change))
    message = (
        r"^MoE: shared_experts must return \[num_tokens, hidden_size\] = \[23, 6\], "
        rf"got shape {got}$"
    )
    for token_mask in (None, torch.rand(T) > 0.5):
        with pytest.raises(RuntimeError, match=message):
            moe(torch.randn(T, H, dtype=F64), token_mask=token_mask)


@pytest.mark.parametrize(
    ("factor", "got"), [(-1.0, "-1.0"), (torch.nan, "nan"), (torch.inf, "inf")]
)
def test_bad_factors(factor: float, got: str) -> None:
    message = f"^MoE: routed_scaling_factor must be a finite number >= 0, got {got}$"
    with pytest.raises(ValueError, match=message):
        make(factor)
    moe = make(2.0)
    with pytest.raises(ValueError, match=message):
        moe.routed_scaling_factor = factor
    assert moe.routed_scaling_factor == 2.0


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"^MoE: shared_experts must be a module, got builtin_function_or_method"
    ):
        make(shared_experts=torch.relu)
    assert MoE(H, INNER, E, K).shared_experts is None


# ---- SharedExperts

ACTIVATIONS = {"swiglu": nn.functional.silu, "geglu": nn.functional.gelu, "relu": torch.relu}


def plain_shared(shared: SharedExperts, x: Tensor) -> Tensor:
    part = shared.experts
    inner = nn.functional.linear(x, *(weight[0] for weight in part._weights[:2]))
    act = ACTIVATIONS[part.activation]
    if part.activation == "relu":
        inner = act(inner)
    else:
        gate, up = inner.chunk(2, dim=-1)
        inner = act(gate) * up
    return nn.functional.linear(inner, part.down_proj[0], part.down_proj_bias[0])


@pytest.mark.parametrize("tokens", [T, 0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_shared_experts_by_their_formula(activation: str, tokens: int) -> None:
    shared = SharedExperts(H, INNER, activation=activation, bias=True, dtype=F64)
    x = torch.randn(tokens, H, dtype=F64, requires_grad=True)
    direction = torch.randn(tokens, H, dtype=F64)
    y, expected = shared(x), plain_shared(shared, x)
    assert_close(y, expected)
    wanted = [x, *shared.parameters()]
    found = torch.autograd.grad((y * direction).sum(), wanted)
    assert_close(found, torch.autograd.grad((expected * direction).sum(), wanted))


def test_shared_experts_compiled_in_bfloat16_and_from_the_meta_device() -> None:
    with torch.device("meta"):
        moe = make(dtype=torch.float32, shared_experts=SharedExperts(H, INNER))
    moe = moe.to_empty(device="cpu")
    moe.reset_parameters()
    moe.bfloat16()
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (T, 11):
        x = torch.randn(tokens, H, dtype=torch.bfloat16)
        y = compiled(x).hidden_states
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, moe(x).hidden_states)
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in moe.shared_experts.parameters())
    assert isinstance(copy.deepcopy(moe).shared_experts, SharedExperts)
