"""What `checkpoint(use_reentrant=True)` leaves of a layer's result and of its gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from plain_moe import gradients
from torchmoe.nn import Balance, MoE, MoEOutput, Routing, WithAttachedLoss

T, H, INNER, E, K = 7, 6, 5, 4, 2


@pytest.fixture
def layer() -> MoE:
    return MoE(H, INNER, E, K, balance=Balance(weight=0.5, z_loss_weight=0.1))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(T, H, requires_grad=True)


def reentrant(function: Callable[..., object], x: Tensor) -> object:
    return checkpoint(function, x, use_reentrant=True)


def tensors_in(routing: Routing) -> list[Tensor]:
    return [
        part
        for value in routing
        for part in (value.values() if isinstance(value, dict) else (value,))
        if isinstance(part, Tensor)
    ]


def gradients_of(layer: torch.nn.Module, x: Tensor, loss: Tensor) -> list[object]:
    layer.zero_grad()
    x.grad = None
    loss.backward()
    return [x.grad, gradients(layer)]


def test_the_result_is_a_plain_tuple(layer: MoE, x: Tensor) -> None:
    output = reentrant(layer, x)
    assert type(output) is tuple
    hidden_states, aux_loss, routing = output
    assert hidden_states.requires_grad
    assert aux_loss.requires_grad
    assert isinstance(routing, Routing)
    expected = layer(x)
    assert_close(hidden_states, expected.hidden_states, rtol=0, atol=0)
    assert_close(aux_loss, expected.aux_loss, rtol=0, atol=0)
    assert_close(routing.logits, expected.routing.logits, rtol=0, atol=0)
    # Any other way keeps the type and the gradients.
    assert isinstance(checkpoint(layer, x, use_reentrant=False), MoEOutput)


def test_both_outputs_train_as_without(layer: MoE, x: Tensor) -> None:
    hidden_states, aux_loss, _ = reentrant(layer, x)
    got = gradients_of(layer, x, hidden_states.square().sum() + aux_loss)
    output = layer(x)
    expected = gradients_of(layer, x, output.hidden_states.square().sum() + output.aux_loss)
    assert_close(got, expected, rtol=0, atol=0)


def test_the_auxiliary_loss_alone_trains_the_router(layer: MoE, x: Tensor) -> None:
    wanted = (x, layer.router.weight)
    reentrant(layer, x)[1].backward()
    assert layer.router.weight.grad.any()
    expected = torch.autograd.grad(layer(x).aux_loss, wanted)
    assert_close(tuple(tensor.grad for tensor in wanted), expected, rtol=0, atol=0)


def test_nothing_in_routing_carries_a_gradient(layer: MoE, x: Tensor) -> None:
    routing = reentrant(layer, x)[2]
    assert len(tensors_in(routing)) == 6 + 2  # the fields that are set, and two losses
    assert not any(tensor.requires_grad for tensor in tensors_in(routing))
    assert layer(x).routing.logits.requires_grad
    assert checkpoint(layer, x, use_reentrant=False).routing.logits.requires_grad


def test_what_the_function_itself_returns_carries_one(layer: MoE, x: Tensor) -> None:
    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        output = layer(x)
        return output.hidden_states, output.routing.logits

    hidden_states, logits = reentrant(parts, x)
    got = gradients_of(layer, x, hidden_states.sum() + logits.square().sum())
    output = layer(x)
    loss = output.hidden_states.sum() + output.routing.logits.square().sum()
    assert_close(got, gradients_of(layer, x, loss), rtol=0, atol=0)


def test_an_attached_loss_survives(layer: MoE, x: Tensor) -> None:
    attached = WithAttachedLoss(layer)
    got = gradients_of(layer, x, reentrant(attached, x).square().sum())
    assert_close(got, gradients_of(layer, x, attached(x).square().sum()), rtol=0, atol=0)


def test_without_a_gradient_of_the_input_nothing_trains(layer: MoE) -> None:
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        hidden_states, aux_loss, _ = reentrant(layer, torch.randn(T, H))
    assert not hidden_states.requires_grad
    assert not aux_loss.requires_grad
