"""The layer: values and gradients against plain PyTorch, masks, capacity, losses, parts, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from float_types import FLOATS
from plain_moe import gradients, plain_balance, plain_moe
from torchmoe import ops
from torchmoe.nn import (
    Balance,
    Capacity,
    ExpertList,
    Experts,
    Gate,
    MoE,
    MoEOutput,
    Router,
    Routing,
)

H, INNER, E, K, T = 6, 7, 5, 2, 23
F64 = torch.float64


def make(**options: object) -> MoE:
    return MoE(H, INNER, E, K, **({"dtype": F64} | options))


@pytest.mark.parametrize("capacity", [None, Capacity(0.9), Capacity(0.9, order="token")])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", ["none", "topk"])
def test_equals_plain_pytorch(
    score_function: str, normalize: str, capacity: Capacity | None
) -> None:
    moe = make(
        gate=Gate(score_function, normalize), capacity=capacity, balance=Balance(z_loss_weight=0.01)
    )
    x = torch.randn(T, H, dtype=F64, requires_grad=True)
    direction = torch.randn(T, H, dtype=F64)

    output = moe(x)
    ((output.hidden_states * direction).sum() + output.aux_loss).backward()
    got = gradients(moe) | {"x": x.grad}
    moe.zero_grad()
    x.grad = None

    routing = output.routing
    y, logits = plain_moe(
        moe,
        x,
        kept=routing.indices >= 0,
        score_function=score_function,
        normalize=normalize,
    )
    scores = logits.softmax(-1) if score_function == "softmax" else logits.sigmoid()
    shares = scores / scores.sum(-1, keepdim=True)
    fraction = routing.tokens_per_expert / (K * T)
    balance = E * (fraction * shares.mean(0)).sum()
    z_loss = logits.logsumexp(-1).square().mean()
    aux_loss = 0.01 * balance + 0.01 * z_loss
    ((y * direction).sum() + aux_loss).backward()

    assert_close(output.hidden_states, y)
    assert_close(output.aux_loss, aux_loss)
    assert_close(routing.losses["load_balancing_loss"], balance)
    assert_close(routing.losses["router_z_loss"], z_loss)
    assert_close(got, gradients(moe) | {"x": x.grad})


def test_the_routing_says_what_happened() -> None:
    moe = make(capacity=Capacity(0.5))
    routing = moe(torch.randn(T, H, dtype=F64)).routing
    assert isinstance(routing, Routing)
    assert torch.equal(routing.selected, routing.logits.topk(K).indices)
    assert torch.equal(
        routing.indices, ops.limit_capacity(routing.selected, 5, num_experts=E)
    )  # ceil(0.5 * 2 * 23 / 5)
    for counts, ids in (
        (routing.tokens_per_expert, routing.selected),
        (routing.kept_per_expert, routing.indices),
    ):
        assert counts.tolist() == [int((ids == e).sum()) for e in range(E)]
    assert routing.kept_per_expert.max() <= 5
    assert routing.token_mask is None
    assert routing.statistics is None
    assert routing.logits.grad_fn is not None
    assert routing.weights.grad_fn is not None


def test_leading_dimensions_are_kept() -> None:
    moe = make()
    x = torch.randn(2, 3, 4, H, dtype=F64)
    output = moe(x)
    assert isinstance(output, MoEOutput)
    assert output.hidden_states.shape == x.shape
    assert torch.equal(output.hidden_states, moe(x.reshape(24, H)).hidden_states.reshape(x.shape))
    assert moe(x[0, 0, 0]).hidden_states.shape == (H,)


@pytest.mark.parametrize("capacity", [None, Capacity(1.1), Capacity(1.1, order="token")])
def test_a_masked_token_might_as_well_not_be_there(capacity: Capacity | None) -> None:
    moe = make(capacity=capacity, balance=Balance(z_loss_weight=0.1))
    x = torch.randn(3, 8, H, dtype=F64)
    mask = torch.rand(3, 8) > 0.4
    x[~mask] = torch.nan
    x.requires_grad_()
    masked = moe(x, token_mask=mask)
    (masked.hidden_states.square().sum() + masked.aux_loss).backward()
    got = gradients(moe)
    moe.zero_grad()

    counted = x.detach()[mask].requires_grad_()
    alone = moe(counted)
    (alone.hidden_states.square().sum() + alone.aux_loss).backward()

    assert (masked.hidden_states[~mask] == 0).all()
    assert (x.grad[~mask] == 0).all()
    assert_close(masked.hidden_states[mask], alone.hidden_states)
    assert_close(x.grad[mask], counted.grad)
    assert_close(masked.aux_loss, alone.aux_loss)
    assert_close(masked.routing.losses, alone.routing.losses)
    assert_close(got, gradients(moe))
    assert torch.equal(masked.routing.tokens_per_expert, alone.routing.tokens_per_expert)
    assert torch.equal(masked.routing.kept_per_expert, alone.routing.kept_per_expert)
    flat = mask.flatten()
    assert torch.equal(masked.routing.indices[flat], alone.routing.indices)
    assert (masked.routing.selected[~flat] == -1).all()
    assert torch.equal(masked.routing.token_mask, flat)


@pytest.mark.parametrize("num_tokens", [0, 4])
def test_without_a_counted_token_everything_is_zero(num_tokens: int) -> None:
    moe = make(capacity=Capacity(1.0, minimum=2), balance=Balance(z_loss_weight=0.1))
    x = torch.randn(num_tokens, H, dtype=F64, requires_grad=True)
    masks = [torch.zeros(num_tokens, dtype=torch.bool)] + ([None] if num_tokens == 0 else [])
    for mask in masks:
        output = moe(x, token_mask=mask)
        (output.hidden_states.sum() + output.aux_loss).backward()
        assert output.hidden_states.shape == x.shape
        assert (output.hidden_states == 0).all()
        assert output.aux_loss == 0
        assert (output.routing.tokens_per_expert == 0).all()
        for gradient in gradients(moe).values():
            assert (gradient == 0).all()


def test_the_capacity_factor_follows_the_mode() -> None:
    moe = make(capacity=Capacity(0.4, eval_factor=100.0))
    x = torch.randn(T, H, dtype=F64)
    assert moe(x).routing.kept_per_expert.max() <= 4  # ceil(0.4 * 2 * 23 / 5)
    assert (moe.eval()(x).routing.indices >= 0).all()
    same = make(capacity=Capacity(0.4)).eval()
    assert same(x).routing.kept_per_expert.max() <= 4


def test_weights_are_formed_before_or_after_dropping() -> None:
    before, after = (
        make(capacity=Capacity(0.5)),
        make(capacity=Capacity(0.5, normalize="after_drop")),
    )
    after.load_state_dict(before.state_dict())
    x = torch.randn(T, H, dtype=F64)
    kept = before(x).routing.indices >= 0
    lost_one = kept.sum(1) == 1
    assert lost_one.any()
    weights = before(x).routing.weights
    assert_close(weights.sum(1), torch.ones(T, dtype=F64))
    assert (weights[lost_one][kept[lost_one]] < 1).all()
    weights = after(x).routing.weights
    assert_close(weights.sum(1), kept.any(1).double())
    assert (weights[lost_one][kept[lost_one]] == 1).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(dtype: torch.dtype) -> None:
    moe = make(dtype=dtype)
    output = moe(torch.randn(T, H, dtype=dtype))
    wide = F64 if dtype == F64 else torch.float32
    assert output.hidden_states.dtype == dtype
    assert output.aux_loss.dtype == wide
    assert output.aux_loss.shape == ()
    assert output.routing.logits.dtype == wide
    assert output.routing.weights.dtype == wide
    (output.hidden_states.float().sum() + output.aux_loss).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(moe).values())


def test_aux_loss_is_the_weighted_sum_of_the_unweighted_losses() -> None:
    x = torch.randn(T, H, dtype=F64)
    output = make()(x)
    assert set(output.routing.losses) == {"load_balancing_loss"}
    assert_close(output.aux_loss, 0.01 * output.routing.losses["load_balancing_loss"])
    output = make(balance=Balance(weight=0.5, z_loss_weight=0.25))(x)
    losses = output.routing.losses
    assert_close(
        output.aux_loss, 0.5 * losses["load_balancing_loss"] + 0.25 * losses["router_z_loss"]
    )
    assert_close(
        losses["load_balancing_loss"],
        plain_balance(output.routing.logits, output.routing.tokens_per_expert, K),
    )
    assert make(balance=Balance(weight=0.0))(x).aux_loss == 0


def test_coefficients_may_change() -> None:
    moe, x = make(), torch.randn(T, H, dtype=F64)
    assert moe.balance == Balance()
    moe.balance = Balance(0.0, z_loss_weight=2.0)
    output = moe(x)
    assert_close(output.aux_loss, 2.0 * output.routing.losses["router_z_loss"])
    moe.balance = replace(moe.balance, z_loss_weight=0.0)
    assert set(moe(x).routing.losses) == {"load_balancing_loss"}
    with pytest.raises(ValueError, match=r"Balance: z_loss_weight must be a finite .*, got -1.0"):
        moe.balance = replace(moe.balance, z_loss_weight=-1.0)


def test_a_selection_bias_ranks_and_does_not_weigh() -> None:
    moe = make(gate=Gate("sigmoid", "none"))
    x = torch.randn(T, H, dtype=F64)
    assert "selection_bias" not in moe.state_dict()
    moe.selection_bias = torch.tensor([0.0, 0.0, 0.0, 10.0, 0.0], dtype=F64)
    assert "selection_bias" in moe.state_dict()
    routing = moe(x).routing
    assert (routing.indices[:, 0] == 3).all()
    probs = routing.logits.sigmoid()
    assert torch.equal(routing.indices, (probs + moe.selection_bias).topk(K).indices)
    assert_close(routing.weights, probs.gather(1, routing.indices))
    moe.reset_parameters()
    assert (moe.selection_bias == 0).all()


def test_experts_may_be_any_callable() -> None:
    scales = torch.arange(1.0, E + 1, dtype=F64)

    def scale(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return x * (weights * scales[indices]).sum(1, keepdim=True)

    moe = MoE(H, None, E, K, experts=scale, dtype=F64)
    x = torch.randn(T, H, dtype=F64)
    output = moe(x)
    routing = output.routing
    assert_close(output.hidden_states, scale(x, routing.indices, routing.weights))
    output.hidden_states.sum().backward()
    assert moe.router.weight.grad.abs().sum() > 0


def test_parts_may_be_replaced() -> None:
    class Logits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :E]

    parts = ExpertList(nn.Linear(H, H, dtype=F64) for _ in range(E))
    moe = MoE(H, INNER, E, K, router=Logits(), experts=parts)
    x = torch.randn(T, H, dtype=F64)
    output = moe(x)
    assert torch.equal(output.routing.logits, x[:, :E])
    assert moe.experts is parts
    router = Router(H, E, bias=True, dtype=F64)
    assert make(router=router).router is router
    moe.reset_parameters()
    moe.update(output.routing)


def test_top_k_1_with_a_constant_weight_is_refused_with_the_way_out() -> None:
    x = torch.randn(T, H, dtype=F64)
    moe = MoE(H, INNER, E, 1, gate=Gate(normalize="topk"), dtype=F64)
    with pytest.raises(ValueError, match=r"gate_weights: estimator must be \"straight_through\""):
        moe(x)
    with torch.no_grad():
        assert (moe(x).routing.weights == 1).all()

    moe = MoE(H, INNER, E, 1, gate=Gate(normalize="topk", estimator="straight_through"), dtype=F64)
    moe(x).hidden_states.sum().backward()
    assert moe.router.weight.grad.abs().sum() > 0

    moe = MoE(
        H, INNER, E, 1, balance=Balance(weight=0.0), dtype=F64
    )  # the default weight is p itself
    output = moe(x)
    chosen = output.routing.logits.softmax(-1).amax(-1, keepdim=True)
    assert_close(output.routing.weights, chosen)
    output.hidden_states.sum().backward()
    assert moe.router.weight.grad.abs().sum() > 0


def test_all_experts_may_be_chosen() -> None:
    moe = MoE(H, INNER, E, E, gate=Gate(normalize="none"), dtype=F64)
    output = moe(torch.randn(T, H, dtype=F64))
    assert_close(output.routing.weights.sum(1), torch.ones(T, dtype=F64))
    assert MoE(H, INNER, 1, 1, dtype=F64)(torch.randn(T, H, dtype=F64)).routing.logits.shape == (
        T,
        1,
    )


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, INNER, E, K), {}, ValueError, r"MoE: hidden_size must be >= 1, got 0"),
        ((H, 0, E, K), {}, ValueError, r"Experts: intermediate_size must be >= 1, got 0"),
        ((H, None, E, K), {}, ValueError, r"MoE: intermediate_size must be given .*, got None"),
        ((H, INNER, 0, 1), {}, ValueError, r"MoE: num_experts must be >= 1, got 0"),
        ((H, INNER, 8, 2.0), {}, TypeError, r"MoE: top_k must be an int, got 2.0"),
        ((6.0, INNER, 8, 2), {}, TypeError, r"MoE: hidden_size must be an int, got 6.0"),
        ((H, INNER, 8, 9), {}, ValueError, r"MoE: top_k must be in \[1, 8\], got 9"),
        ((H, INNER, 8, 0), {}, ValueError, r"MoE: top_k must be in \[1, 8\], got 0"),
        (
            (H, INNER, E, K),
            {"activation": "tanh"},
            ValueError,
            r"Experts: activation must .*\"tanh\"",
        ),
        ((H, INNER, E, K), {"balance": 0.1}, TypeError, r"MoE: balance must be a Balance, .* 0.1"),
        (
            (H, INNER, E, K),
            {"gate": "exact"},
            TypeError,
            r"MoE: gate must be a Gate.*, got 'exact'",
        ),
        ((H, INNER, E, K), {"capacity": 1.25}, TypeError, r"MoE: capacity must be .*, got 1.25"),
        (
            (H, INNER, E, K),
            {"router": Router(H, E + 1)},
            ValueError,
            r"MoE: router must have num_experts 5, got 6",
        ),
        (
            (H, INNER, E, K),
            {"experts": Experts(H + 2, INNER, E)},
            ValueError,
            r"MoE: experts must have hidden_size 6, got 8",
        ),
    ],
)
def test_construction_errors(
    arguments: tuple[int, ...], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        MoE(*arguments, **options)


def test_forward_and_update_errors() -> None:
    moe = make()
    x = torch.randn(2, 3, H, dtype=F64)
    with pytest.raises(
        RuntimeError, match=r"MoE: x must be \[..., hidden_size\] = \[..., 6\], got shape \[2, 3\]"
    ):
        moe(x[..., 0])
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(
        RuntimeError, match=r"MoE: token_mask must be bool of shape \[2, 3\], got .* \[6\]"
    ):
        moe(x, token_mask=mask.flatten())
    with pytest.raises(RuntimeError, match=r"MoE: token_mask must be bool .*, got torch.float32"):
        moe(x, token_mask=mask.float())
    moe.router = nn.Linear(H, E + 1, dtype=F64)
    with pytest.raises(RuntimeError, match=r"MoE: router must return .* \[6, 5\], got .*\[6, 6\]"):
        moe(x)
    with pytest.raises(ValueError, match=r"MoE: routing must hold at least one Routing"):
        moe.update([])
    moe = make()
    with pytest.raises(TypeError, match=r"MoE: routing must be a Routing, .*, got Tensor"):
        moe.update(moe(x))
    routing = moe(x).routing
    with pytest.raises(ValueError, match=r"routing must hold .*, got them in 1 of 2"):
        moe.update([routing, routing._replace(statistics=torch.ones(E))])
