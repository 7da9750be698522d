"""attach_loss: a copy of x that carries a loss in its graph."""

from __future__ import annotations

import pytest
import torch

import reference
import torchmoe
from gradient_harness import DifferentiableOpTests
from op_case import ErrorCase, Inputs, OpCase, altered, leaves, wide_dtype
from situations import SITUATIONS, Situation, normal


def make(s: Situation, dtype: torch.dtype, scale: float) -> Inputs:
    return {
        "x": normal(s.T, s.H, dtype=dtype),
        "loss": normal(dtype=wide_dtype(dtype)),
        "scale": scale,
    }


class TestAttachLoss(DifferentiableOpTests):
    case = OpCase(
        name="attach_loss",
        schema="attach_loss(Tensor x, Tensor loss, float scale=1.) -> Tensor",
        make=make,
        reference=reference.attach_loss,
        wrapper=lambda inputs: torchmoe.ops.attach_loss(**inputs),
        situations=("plain", "one_token", "no_tokens", "large"),
        variants=({"scale": 0.5}, {"scale": 1.0}, {"scale": 0.0}),
        differentiable=("x", "loss"),
        is_derivative=lambda inputs: not inputs["loss"].requires_grad,
        without_tangent=("loss",),
        errors=(
            ErrorCase("x", altered("x", lambda x: x.long()), "Long"),
            ErrorCase("loss", altered("loss", lambda s: s[None]), r"\[1\]"),
            ErrorCase("loss", altered("loss", lambda s: s.long()), "Long"),
        ),
    )

    def test_devices_must_agree(self) -> None:
        """They need not: the loss only gets its gradient, on its own device."""
        loss = torch.zeros((), device="meta", requires_grad=True)
        x = torch.randn(4, requires_grad=True)
        grads = torch.autograd.grad(torchmoe.ops.attach_loss(x, loss).sum(), [x, loss])
        assert torch.equal(grads[0], torch.ones(4))
        assert grads[1].is_meta

    def test_the_value_is_a_copy_bit_for_bit(self) -> None:
        x = torch.tensor([1.0, -0.0, torch.nan, torch.inf, 1e-45])
        y = torchmoe.ops.attach_loss(x, torch.tensor(torch.nan))
        assert torch.equal(y.view(torch.int32), x.view(torch.int32))
        assert y.data_ptr() != x.data_ptr()

    def test_the_loss_reaches_its_parameters_whatever_is_done_with_x(self) -> None:
        for scale in (1.0, 0.25):
            parameter = torch.tensor(3.0, requires_grad=True)
            x = torch.randn(4, requires_grad=True)
            y = torchmoe.ops.attach_loss(x, parameter**2, scale)
            (y * 1000.0).sum().backward()
            assert parameter.grad == 6.0 * scale
            assert torch.equal(x.grad, torch.full((4,), 1000.0))

    def test_x_without_a_gradient(self) -> None:
        loss = torch.tensor(2.0, requires_grad=True)
        torchmoe.ops.attach_loss(torch.randn(4), loss).sum().backward()
        assert loss.grad == 1.0

    def test_loss_without_a_gradient(self) -> None:
        x = torch.randn(4, requires_grad=True)
        torchmoe.ops.attach_loss(x, torch.tensor(2.0)).sum().backward()
        assert torch.equal(x.grad, torch.ones(4))

    def test_a_tangent_of_the_loss_is_refused(self) -> None:
        loss = torch.tensor(2.0)
        with pytest.raises(
            NotImplementedError,
            match="attach_loss: forward-mode derivatives by loss must not be requested, got",
        ):
            torch.func.jvp(lambda s: torchmoe.ops.attach_loss(torch.ones(3), s), (loss,), (loss,))

    def test_a_penalty_on_the_gradient_sees_the_loss_once(self) -> None:
        """The objective that it is part of passes through the copy once."""
        x = torch.randn(5, 3, dtype=torch.float64)
        weight = torch.randn(3, dtype=torch.float64, requires_grad=True)

        def gradient(*, attached: bool) -> torch.Tensor:
            y, loss = x @ weight, (weight**4).sum()
            y = torchmoe.ops.attach_loss(y, loss) if attached else y
            objective = y.square().sum() + (0.0 if attached else loss)
            (first,) = torch.autograd.grad(objective, weight, create_graph=True)
            penalised = objective + first.square().sum()
            return torch.autograd.grad(penalised, weight)[0]

        torch.testing.assert_close(gradient(attached=True), gradient(attached=False))

    def test_default_scale_is_one(self) -> None:
        inputs = leaves(make(SITUATIONS["plain"], torch.float32, 1.0), ("loss",))
        torchmoe.ops.attach_loss(inputs["x"], inputs["loss"]).sum().backward()
        assert inputs["loss"].grad == 1.0

    def test_the_loss_may_be_changed_in_place_afterwards(self) -> None:
        loss = torch.tensor(2.0, requires_grad=True)
        x, term = torch.randn(4, requires_grad=True), 3.0 * loss
        y = torchmoe.ops.attach_loss(x, term)
        term.detach().zero_()
        y.sum().backward()
        assert loss.grad == 3.0
