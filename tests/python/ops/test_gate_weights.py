"""gate_weights: the weight of each slot, and its two gradients."""

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
    cotangents,
    run,
    tolerance,
    wide_dtype,
)
from reference import log_sigmoid
from situations import SITUATIONS, Situation, normal

# Where all sigmoids of a token are 0 or nearly, in each type that they are formed in.
UNDERFLOWS = [
    (torch.float32, -33.0),
    (torch.float32, -88.0),
    (torch.float32, -90.0),
    (torch.float32, -1e4),
    (torch.bfloat16, -128.0),
    (torch.float16, -128.0),
    (torch.float64, -90.0),
    (torch.float64, -800.0),
]

SETTINGS = tuple(
    {"score_function": score, "normalize": normalize, "estimator": estimator}
    for estimator in ("exact", "straight_through")
    for normalize in ("topk", "none", "uniform")
    for score in ("softmax", "sigmoid")
)


def make(s: Situation, dtype: torch.dtype, **settings: str) -> Inputs:
    return {"logits": normal(s.T, s.E, dtype=dtype), "indices": s.indices(), **settings}


def private(inputs: Inputs) -> list[tuple[str, Inputs]]:
    grad = normal(*inputs["indices"].shape, dtype=wide_dtype(inputs["logits"].dtype))
    return [("_gate_weights_backward", {"grad": grad, **inputs})]


def refuses_gradient(inputs: Inputs) -> bool:
    """The exact gradient is zero everywhere."""
    constant = inputs["normalize"] == "uniform" or (
        inputs["normalize"] == "topk" and inputs["indices"].size(1) == 1
    )
    return inputs["estimator"] == "exact" and constant


def no_such(name: str) -> ErrorCase:
    return ErrorCase(name, altered(name, lambda value: "hard"), '"hard"', ValueError)


class TestGateWeights(DifferentiableOpTests):
    case = OpCase(
        name="gate_weights",
        schema=(
            "gate_weights(Tensor logits, Tensor indices, *, str score_function, str normalize, "
            "str estimator) -> Tensor"
        ),
        make=make,
        reference=reference.gate_weights,
        wrapper=lambda inputs: torchmoe.ops.gate_weights(**inputs),
        variants=SETTINGS,
        result_is_wide=True,
        differentiable=("logits",),
        refuses_gradient=refuses_gradient,
        is_derivative=lambda i: i["estimator"] == "exact" or i["normalize"] == "none",
        token_input="logits",
        autocast=Autocast(torch.float32, ("logits",)),
        private=private,
        errors=(
            ErrorCase("logits", altered("logits", lambda t: t[0]), r"\[4\]"),
            ErrorCase("logits", altered("logits", lambda t: t.long()), "Long"),
            ErrorCase("indices", altered("indices", lambda t: t[0]), r"\[2\]"),
            ErrorCase("indices", altered("indices", lambda t: t[1:]), r"\[5, 2\]"),
            ErrorCase("indices", altered("indices", lambda t: t.int()), "Int"),
            no_such("score_function"),
            no_such("normalize"),
            no_such("estimator"),
        ),
    )

    def test_straight_through_is_the_closed_form(
        self, situation: Situation, variant: Inputs
    ) -> None:
        if variant["estimator"] != "straight_through":
            return
        inputs = make(situation, torch.float64, **variant)
        outputs, (grad,) = run(self.case, inputs, ("logits",))
        expected = reference.straight_through_gradient(
            cotangents(outputs)[0], inputs["logits"], inputs["indices"], variant["score_function"]
        )
        n = situation.longest
        atol = tolerance(expected, n=n, wide=torch.float64, stored=torch.float64)
        assert_close(grad, expected, atol)

    def test_weights_of_a_routed_token_sum_to_one(self, variant: Inputs) -> None:
        if variant["normalize"] == "none":
            return
        inputs = make(SITUATIONS["dropped"], torch.float64, **variant)
        (weights,) = self.case(inputs)
        routed = inputs["indices"] >= 0
        torch.testing.assert_close(weights.sum(1), routed.any(1).double())
        assert bool((weights[~routed] == 0).all())

    def test_topk_survives_where_p_underflows(self) -> None:
        logits = torch.tensor([[1000.0, 0.0, 0.0, 1.0]], requires_grad=True)
        weights = torchmoe.ops.gate_weights(
            logits,
            torch.tensor([[1, 2]]),
            score_function="softmax",
            normalize="topk",
            estimator="exact",
        )
        assert weights.tolist() == [[0.5, 0.5]]
        (grad,) = torch.autograd.grad(weights[0, 0], logits)
        assert grad.tolist() == [[0.0, 0.25, -0.25, 0.0]]

    def test_logits_of_minus_inf_give_zero_and_a_zero_gradient(self, variant: Inputs) -> None:
        """A masked-out expert, and a token whose experts are all masked out."""
        inputs = make(SITUATIONS["plain"], torch.float64, **variant)
        inputs["logits"][0] = -math.inf
        inputs["logits"][1, inputs["indices"][1, 0]] = -math.inf
        outputs, grads = run(self.case, inputs, self.case.names(inputs))
        if variant["normalize"] != "uniform":
            assert bool((outputs[0][0] == 0).all())
            assert outputs[0][1, 0] == 0
        for grad in grads:
            assert bool(grad.isfinite().all())
            assert bool((grad[0] == 0).all())
            assert grad[1, inputs["indices"][1, 0]] == 0

    @pytest.mark.parametrize(("stored", "low"), UNDERFLOWS)
    def test_sigmoids_are_normalised_where_they_underflow(
        self, stored: torch.dtype, low: float
    ) -> None:
        logits = torch.tensor([0.0, -0.5, 3.0, -0.25]).to(stored).add(low)[None].requires_grad_()
        weights = torchmoe.ops.gate_weights(
            logits,
            torch.tensor([[0, 1, -1, 3]]),
            score_function="sigmoid",
            normalize="topk",
            estimator="exact",
        )
        g = torch.tensor([[1.0, -2.0, 5.0, 0.5]], dtype=weights.dtype)
        (grad,) = torch.autograd.grad(weights, logits, g)

        exact = logits.detach().double().requires_grad_()
        shares = log_sigmoid(exact)[:, [0, 1, 3]].softmax(dim=1)
        (expected,) = torch.autograd.grad(shares, exact, g[:, [0, 1, 3]].double())
        # A logit of this size is known to eps of itself, and exp carries that into the share.
        atol = 8 * abs(low) * torch.finfo(weights.dtype).eps
        assert_close(weights[:, [0, 1, 3]], shares, atol)
        assert_close(grad, expected, atol + 4 * torch.finfo(stored).eps)
        assert weights[0, 2] == grad[0, 2] == 0

    @pytest.mark.above_kernels
    @pytest.mark.parametrize(("stored", "far"), [(torch.float32, 200.0), (torch.float64, 800.0)])
    def test_second_derivatives_of_sigmoids_that_are_one(
        self, stored: torch.dtype, far: float
    ) -> None:
        """Where exp(far) overflows: a sigmoid of 1 does not move, and neither do the weights."""
        indices = torch.tensor([[0, 2]])

        def weight(logits: Tensor) -> Tensor:
            weights = torchmoe.ops.gate_weights(
                logits, indices, score_function="sigmoid", normalize="topk", estimator="exact"
            )
            return weights[0, 0]

        logits = torch.tensor([[far, 0.0, far + 1.0]], dtype=stored)
        assert torch.equal(torch.func.hessian(weight)(logits).count_nonzero(), torch.tensor(0))

    def test_worked_by_hand_far_below_zero(self) -> None:
        weights = torchmoe.ops.gate_weights(
            torch.tensor([[-90.0, -90.5]]),
            torch.tensor([[0, 1]]),
            score_function="sigmoid",
            normalize="topk",
            estimator="exact",
        )
        torch.testing.assert_close(weights, torch.tensor([[0.62246, 0.37754]]), rtol=0, atol=1e-4)

    @pytest.mark.parametrize(("normalize", "top_k"), [("uniform", 1), ("uniform", 2), ("topk", 1)])
    def test_a_gradient_of_zero_is_refused(self, normalize: str, top_k: int) -> None:
        situation = Situation("refused", K=top_k)
        inputs = make(
            situation, torch.float32, score_function="softmax", normalize=normalize,
            estimator="exact",
        )  # fmt: skip
        without = self.case(inputs)
        logits = inputs["logits"].clone().requires_grad_()
        message = r'^gate_weights: estimator must be "straight_through", or normalize "none".*, got'
        with pytest.raises(ValueError, match=message):
            self.case(inputs | {"logits": logits})
        with torch.no_grad():
            assert torch.equal(self.case(inputs | {"logits": logits})[0], without[0])
        (weights,) = self.case(inputs | {"logits": logits, "estimator": "straight_through"})
        assert torch.equal(weights, without[0])
        (grad,) = torch.autograd.grad((weights * normal(*weights.shape)).sum(), logits)
        assert bool((grad != 0).any())
