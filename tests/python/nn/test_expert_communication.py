"""Experts that talk: the formula by loops, who takes part, and that it behaves as a module."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from communicating_experts import (
    ALONE,
    F64,
    INNER,
    SITUATIONS,
    TOGETHER,
    E,
    H,
    K,
    T,
    check_against_loops,
    eps,
    ids,
    listed,
    moe_of,
    plain,
    run,
    scaled,
    stacked,
    talking,
)
from plain_moe import gradients
from torchmoe.nn import (
    Assistance,
    Capacity,
    ExpertCommunication,
    Experts,
    Gate,
    Router,
)
from torchmoe.nn.estimators.estimator import ExpertFunction
from torchmoe.nn.estimators.registry import build_estimator
from torchmoe.testing import gradcheck

# ---- the formula


@pytest.mark.parametrize("situation", SITUATIONS)
def test_equals_a_loop_over_tokens_slots_and_heads(situation: str) -> None:
    check_against_loops(talking(stacked()), ids(situation))


@pytest.mark.parametrize("experts", [listed, lambda: scaled], ids=["list", "function"])
@pytest.mark.parametrize("num_heads", [1, 2, 8])
def test_any_experts_and_any_number_of_heads(
    experts: Callable[[], ExpertFunction], num_heads: int
) -> None:
    check_against_loops(talking(experts(), num_heads=num_heads), ids("dropped"))


def test_slots_matter_to_each_other() -> None:
    """What one slot chose changes the output by more than its own part."""
    layer = talking(stacked())
    x = torch.randn(T, H, dtype=F64)
    weights = torch.tensor([1.0, 0.0, 0.0], dtype=F64).expand(T, K)
    indices = ids("plain")
    other = indices.clone()
    other[:, 1] = -1
    change = (layer(x, indices, weights) - layer(x, other, weights)).abs().amax(dim=1)
    assert (change > 1e-3).all()


def test_the_order_of_the_slots_means_nothing() -> None:
    layer = talking(stacked())
    indices, x = ids("dropped"), torch.randn(T, H, dtype=F64)
    weights = torch.rand(T, K, dtype=F64)
    shuffle = torch.rand(T, K).argsort(dim=1)
    assert_close(
        layer(x, indices.gather(1, shuffle), weights.gather(1, shuffle)), layer(x, indices, weights)
    )


def test_tokens_do_not_see_each_other() -> None:
    layer = talking(stacked())
    indices, x = ids("dropped"), torch.randn(T, H, dtype=F64)
    weights = torch.rand(T, K, dtype=F64)
    whole = layer(x, indices, weights)
    for t in range(T):
        one = slice(t, t + 1)
        assert_close(layer(x[one], indices[one], weights[one]), whole[one])


def test_the_outputs_length_does_not_change_what_is_said() -> None:
    """Queries, keys and values are of directions: the exchange alone is the same for 1000 x."""
    layer = talking(scaled)
    indices, x = ids("plain"), torch.randn(T, H, dtype=F64)
    weights = torch.rand(T, K, dtype=F64)
    said = [layer(f * x, indices, weights) - scaled(f * x, indices, weights) for f in (1.0, 1000.0)]
    assert said[0].abs().max() > 0.1
    # The difference cancels what is 1000 times as large.
    assert_close(said[0], said[1], rtol=1e-9, atol=1e-9)


# ---- who takes part


@pytest.mark.parametrize("situation", ["one_each", "all_dropped", "top1"])
def test_nobody_to_talk_to(situation: str) -> None:
    """The layer is the one without, and the projections get a gradient of zeros."""
    layer = talking(stacked(torch.float32), torch.float32)
    indices, x = ids(situation), torch.randn(T, H)
    weights = torch.rand(indices.shape)
    got = run(layer, layer, indices, x, weights)
    expected = run(layer.experts, layer.experts, indices, x, weights)
    for name in ("y", "x", "weights"):
        assert_close(got[name], expected[name], rtol=0, atol=close_to(layer.experts, x, indices))
    assert (got["qkv_proj"] == 0).all()
    assert (got["out_proj"] == 0).all()


def close_to(experts: Experts, x: Tensor, indices: Tensor) -> float:
    """Sums of at most 2 * INNER + K terms in another order, each below the largest output."""
    everyone = torch.arange(E).expand(x.shape[0], E)
    largest = experts(x, everyone, torch.ones(everyone.shape)).abs().max().item()
    return (2 * INNER + indices.shape[1]) * eps(x.dtype) * max(1.0, largest) * H


@pytest.mark.parametrize("situation", SITUATIONS)
def test_starts_as_the_layer_without(situation: str) -> None:
    """Up to rounding: without, the experts' last sum and that over the slots are one."""
    layer = ExpertCommunication(stacked(torch.float32), H, E)
    indices = ids(situation)
    x, weights = torch.randn(indices.shape[0], H), torch.rand(indices.shape)
    y = layer(x, indices, weights)
    tolerance = close_to(layer.experts, x, indices) if len(x) else 0.0
    assert_close(y, layer.experts(x, indices, weights), rtol=0, atol=tolerance)
    y.square().sum().backward()
    assert (layer.qkv_proj.grad == 0).all()
    learns = situation not in ("one_each", "all_dropped", "top1", "no_tokens")
    assert (layer.out_proj.grad != 0).any() == learns


def test_the_weight_of_a_slot_that_is_not_routed_is_ignored() -> None:
    layer = talking(stacked())
    indices, x = ids("dropped"), torch.randn(T, H, dtype=F64)
    weights = torch.rand(T, K, dtype=F64)
    expected = run(layer, layer, indices, x, weights)
    got = run(layer, layer, indices, x, weights.masked_fill(indices < 0, torch.nan))
    assert_close(got, expected, rtol=0, atol=0)
    assert (got["weights"][indices < 0] == 0).all()


def test_a_mask_over_nan_padding() -> None:
    moe = moe_of(talking(stacked()))
    x = torch.randn(T, H, dtype=F64)
    mask = torch.rand(T) > 0.4
    padded = x.masked_fill(~mask[:, None], torch.nan).requires_grad_()
    output = moe(padded, token_mask=mask)
    (output.hidden_states.square().sum() + output.aux_loss).backward()
    assert (output.hidden_states[~mask] == 0).all()
    assert_close(output.hidden_states[mask], moe(x[mask]).hidden_states)
    assert (padded.grad[~mask] == 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients(moe).values())


# ---- in a layer


@pytest.mark.parametrize("estimator", TOGETHER)
def test_with_capacity_assistance_and_shared_experts(estimator: str) -> None:
    moe = moe_of(
        talking(stacked()),
        gate=Gate(estimator=estimator),
        capacity=Capacity(1.2),
        assistance=Assistance((1, 2, 3, 4, 0)),
        shared_experts=nn.Linear(H, H, dtype=F64),
        router=Router(H, E, track_usage=True, dtype=F64),
    )
    moe.assistance.assisted.fill_(True)
    x = torch.randn(T, H, dtype=F64)
    output = moe(x)
    routing = output.routing
    assert (routing.indices < 0).any()
    assert (routing.indices[:, -1] >= 0).any()
    expected = plain(moe.experts, x, routing.indices, routing.weights) + moe.shared_experts(x)
    assert_close(output.hidden_states, expected)
    (output.hidden_states.square().sum() + output.aux_loss).backward()
    assert all((gradient != 0).any() for gradient in gradients(moe).values())


@pytest.mark.parametrize("estimator", ALONE)
def test_refuses_estimators_that_need_each_experts_output_alone(estimator: str) -> None:
    kind = type(build_estimator(estimator)).__name__
    with pytest.raises(ValueError, match=r"^MoE: ") as caught:
        moe_of(talking(stacked()), gate=Gate(estimator=estimator))
    assert str(caught.value) == (
        "MoE: gate.estimator must not need the output of each expert alone with "
        f"ExpertCommunication, where it depends on the token's other experts, got {kind}"
    )
    assert set(ALONE) >= {"default_vector", "straight_through_dense"}


# ---- gradients


@pytest.mark.parametrize("situation", ["dropped", "repeated", "top1"])
def test_gradients_of_every_parameter_of_x_and_of_the_weights(situation: str) -> None:
    indices = ids(situation)[:5]
    x, weights = torch.randn(5, H), torch.rand(indices.shape)
    assert gradcheck(talking(Experts(H, 2, E, activation="gelu")), [x, indices, weights])


def test_gradients_of_the_layer() -> None:
    moe = moe_of(talking(stacked()), capacity=Capacity(0.9))
    assert gradcheck(moe, torch.randn(6, H))


@pytest.mark.parametrize("experts", [listed, stacked], ids=["list", "stacked"])
def test_double_backward(experts: Callable[[], ExpertFunction]) -> None:
    layer = talking(experts())
    indices = ids("dropped")[:4]
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, values, (x, indices, weights))

    tensors = [torch.randn(4, H, dtype=F64), torch.rand(indices.shape, dtype=F64)]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    # Token 0 has no routed slot, so that its outputs have no direction.
    parameters = [p.detach().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradgradcheck(call, [*tensors, *parameters], fast_mode=True)
