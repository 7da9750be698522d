"""load_balancing_loss: E * sum_i fraction_i * P_i."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import reference
import torchmoe
from gradient_harness import DifferentiableOpTests
from op_case import (
    Autocast,
    ErrorCase,
    Inputs,
    OpCase,
    altered,
    assert_close,
    run,
    wide_dtype,
)
from situations import SITUATIONS, Situation, normal


def make(
    s: Situation, dtype: torch.dtype, score_function: str, groups: tuple[int, ...], mask: bool
) -> Inputs:
    token_mask = torch.rand(*groups, s.T) < 0.6
    if groups:
        token_mask[0] = False  # a group without a counted token
    return {
        "logits": normal(*groups, s.T, s.E, dtype=dtype),
        "fraction": torch.softmax(normal(*groups, s.E), -1).to(wide_dtype(dtype)),
        "score_function": score_function,
        "token_mask": token_mask if mask else None,
    }


def private(inputs: Inputs) -> list[tuple[str, Inputs]]:
    grad = normal(dtype=wide_dtype(inputs["logits"].dtype))
    return [("_load_balancing_loss_backward", {"grad": grad, **inputs})]


class TestLoadBalancingLoss(DifferentiableOpTests):
    case = OpCase(
        name="load_balancing_loss",
        schema=(
            "load_balancing_loss(Tensor logits, Tensor fraction, *, str score_function, "
            "Tensor? token_mask=None) -> Tensor"
        ),
        make=make,
        reference=reference.load_balancing_loss,
        wrapper=lambda inputs: torchmoe.ops.load_balancing_loss(**inputs),
        situations=("plain", "single_expert", "one_token", "no_tokens", "many", "large"),
        variants=(
            {"score_function": "softmax", "groups": (), "mask": True},
            {"score_function": "sigmoid", "groups": (), "mask": False},
            {"score_function": "softmax", "groups": (3,), "mask": False},
            {"score_function": "sigmoid", "groups": (2, 3), "mask": True},
        ),
        result_is_wide=True,
        differentiable=("logits",),
        autocast=Autocast(torch.float32, ("logits", "fraction")),
        private=private,
        errors=(
            ErrorCase("logits", altered("logits", lambda t: t[0]), r"\[4\]"),
            ErrorCase("logits", altered("logits", lambda t: t.long()), "Long"),
            ErrorCase("fraction", altered("fraction", lambda f: f[1:]), r"\[3\]"),
            ErrorCase("fraction", altered("fraction", lambda f: f[None]), r"\[1, 4\]"),
            ErrorCase("fraction", altered("fraction", lambda f: f.long()), "Long"),
            ErrorCase("token_mask", altered("token_mask", lambda m: m[1:]), r"\[5\]"),
            ErrorCase("token_mask", altered("token_mask", lambda m: m.float()), "Float"),
            ErrorCase(
                "score_function", altered("score_function", lambda s: "relu"), '"relu"', ValueError
            ),
        ),
    )

    @pytest.mark.parametrize(
        ("stored", "low"),
        [
            (torch.float32, -33.0),
            (torch.float32, -88.0),
            (torch.float32, -90.0),
            (torch.bfloat16, -128.0),
            (torch.float64, -800.0),
        ],
    )
    def test_sigmoids_that_underflow_are_no_floor(self, stored: torch.dtype, low: float) -> None:
        """Else a router could leave the loss by pushing its logits down."""
        logits = torch.tensor([[0.0, -1.0, 2.0, 0.5], [1.0, 0.0, 0.0, -2.0]]).to(stored).add(low)
        logits.requires_grad_()
        fraction = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=wide_dtype(stored))
        loss = torchmoe.ops.load_balancing_loss(logits, fraction, score_function="sigmoid")
        (grad,) = torch.autograd.grad(loss, logits)

        exact = logits.detach().double().requires_grad_()
        mean = reference.log_sigmoid(exact).softmax(dim=1).mean(dim=0)
        expected = 4 * (fraction.double() * mean).sum()
        (expected_grad,) = torch.autograd.grad(expected, exact)
        # A logit of this size is known to eps of itself, and exp carries that into the share.
        atol = 8 * abs(low) * torch.finfo(wide_dtype(stored)).eps
        assert_close(loss, expected, atol)
        assert_close(grad, expected_grad, atol + 4 * torch.finfo(stored).eps)

    @pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
    def test_one_where_either_is_uniform(self, score_function: str) -> None:
        logits = normal(50, 8)
        uniform = torch.full((8,), 1 / 8, dtype=torch.float64)
        skewed = torch.softmax(normal(8), 0)
        loss = torchmoe.ops.load_balancing_loss(logits, uniform, score_function=score_function)
        torch.testing.assert_close(loss.item(), 1.0)
        loss = torchmoe.ops.load_balancing_loss(
            torch.zeros_like(logits), skewed, score_function=score_function
        )
        torch.testing.assert_close(loss.item(), 1.0)

    def test_e_at_the_collapse(self) -> None:
        logits = torch.tensor([0.0, 1e4, 0.0, 0.0]).expand(7, 4)
        fraction = torch.tensor([0.0, 1.0, 0.0, 0.0])
        loss = torchmoe.ops.load_balancing_loss(logits, fraction, score_function="softmax")
        assert loss.item() == 4.0

    def test_masked_tokens_do_not_count(self, variant: Inputs) -> None:
        inputs = make(SITUATIONS["plain"], torch.float32, **(variant | {"mask": True}))
        counted = inputs["token_mask"]
        poisoned = inputs | {"logits": inputs["logits"].masked_fill(~counted[..., None], math.nan)}
        clean, dirty = (run(self.case, i, ("logits",)) for i in (inputs, poisoned))
        assert torch.equal(dirty[0][0], clean[0][0])
        assert torch.equal(dirty[1][0], clean[1][0])
        assert bool((dirty[1][0][~counted] == 0).all())

    @pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
    def test_a_row_of_minus_inf_adds_nothing(self, score_function: str) -> None:
        inputs = make(SITUATIONS["plain"], torch.float64, score_function, (), mask=False)
        inputs["logits"][0] = -math.inf
        inputs["logits"][1, 2] = -math.inf
        (loss,), (grad,) = run(self.case, inputs, ("logits",))
        torch.testing.assert_close(loss, reference.load_balancing_loss(**inputs))
        assert bool((grad[0] == 0).all())
        assert grad[1, 2] == 0
        assert bool(grad.isfinite().all())

    @pytest.mark.above_kernels
    @pytest.mark.parametrize(("stored", "far"), [(torch.float32, 200.0), (torch.float64, 800.0)])
    def test_second_derivatives_of_sigmoids_that_are_one(
        self, stored: torch.dtype, far: float
    ) -> None:
        """Where exp(far) overflows: a sigmoid of 1 does not move, and neither does the loss."""
        fraction = torch.tensor([0.7, 0.3], dtype=stored)

        def loss(logits: Tensor) -> Tensor:
            return torchmoe.ops.load_balancing_loss(logits, fraction, score_function="sigmoid")

        logits = torch.tensor([[far, far + 1.0]], dtype=stored)
        assert torch.equal(torch.func.hessian(loss)(logits).count_nonzero(), torch.tensor(0))

    def test_fraction_gets_no_gradient(self) -> None:
        inputs = make(SITUATIONS["plain"], torch.float32, "softmax", (), mask=False)
        fraction = inputs["fraction"].requires_grad_()
        logits = inputs["logits"].requires_grad_()
        (loss,) = self.case(inputs)
        grads = torch.autograd.grad(loss, [logits, fraction], allow_unused=True)
        assert grads[1] is None or not grads[1].any()

    def test_no_groups(self) -> None:
        loss = torchmoe.ops.load_balancing_loss(
            torch.zeros(0, 5, 4), torch.zeros(0, 4), score_function="softmax"
        )
        assert loss.item() == 0.0

    def test_small_probabilities_do_not_overflow_the_gradient(self) -> None:
        """A gradient scaler multiplies the loss, and a sum of sigmoids may be as small as 1e-34."""
        inputs = make(SITUATIONS["plain"], torch.float32, "sigmoid", (), mask=False)
        inputs["logits"] = inputs["logits"] - 80.0
        logits = inputs["logits"].requires_grad_()
        (grad,) = torch.autograd.grad(65536.0 * self.case(inputs)[0], logits)
        wide = {k: v.detach().double() if torch.is_tensor(v) else v for k, v in inputs.items()}
        exact = wide["logits"].requires_grad_()
        (expected,) = torch.autograd.grad(65536.0 * reference.load_balancing_loss(**wide), exact)
        torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-2)
