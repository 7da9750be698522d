"""attach_dense_gradient: a copy of y that gives every expert's score its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import reference
import torchmoe
from gradient_harness import GRADCHECK, DifferentiableOpTests
from op_case import Autocast, ErrorCase, Inputs, OpCase, altered, call, leaves, wide_dtype
from situations import EXPERT_WEIGHTS, SITUATIONS, Situation, expert_weights, normal


def make(
    s: Situation, dtype: torch.dtype, activation: str, bias: bool, **shaped: float | bool
) -> Inputs:
    return {
        "x": normal(s.T, s.H, dtype=dtype),
        "y": normal(s.T, s.H, dtype=dtype),
        "probs": normal(s.T, s.E, dtype=wide_dtype(dtype)).softmax(-1),
        **expert_weights(s, dtype, activation, bias),
        "activation": activation,
        **shaped,
    }


def private(inputs: Inputs) -> list[tuple[str, Inputs]]:
    rest = {k: v for k, v in inputs.items() if k not in ("y", "probs")}
    return [("_attach_dense_gradient_backward", rest | {"grad": inputs["y"]})]


class TestAttachDenseGradient(DifferentiableOpTests):
    case = OpCase(
        name="attach_dense_gradient",
        schema=(
            "attach_dense_gradient(Tensor y, Tensor probs, Tensor x, Tensor w_in, Tensor? b_in, "
            "Tensor w_out, Tensor? b_out, str activation, *, float alpha=1., float? limit=None, "
            "float up_offset=0., float? gate_softcap=None, float? up_softcap=None, "
            "bool interleaved=False) -> Tensor"
        ),
        make=make,
        reference=reference.attach_dense_gradient,
        wrapper=lambda inputs: torchmoe.ops.attach_dense_gradient(**inputs),
        situations=(
            "plain",
            "dropped",
            "single_expert",
            "one_token",
            "no_tokens",
            "large",
            "aligned",
        ),
        variants=(
            {"activation": "swiglu", "bias": True},
            {"activation": "gelu", "bias": False},
            {
                "activation": "swiglu",
                "bias": True,
                "interleaved": True,
                "alpha": 1.5,
                "up_offset": 1.0,
            },
        ),
        differentiable=("probs",),
        is_derivative=lambda inputs: False,
        private=private,
        token_input="y",
        autocast=Autocast(torch.bfloat16, ("x", *EXPERT_WEIGHTS)),
        errors=(
            ErrorCase("y", altered("y", lambda y: y[1:]), r"\[5, 5\]"),
            ErrorCase("y", altered("y", lambda y: y[0]), r"\[5\]"),
            ErrorCase("y", altered("y", lambda y: y.long()), "Long"),
            ErrorCase("probs", altered("probs", lambda p: p[:, 1:]), r"\[6, 3\]"),
            ErrorCase("probs", altered("probs", lambda p: p[0]), r"\[4\]"),
            ErrorCase("probs", altered("probs", lambda p: p.long()), "Long"),
            ErrorCase("x", altered("x", lambda x: x[0]), r"\[5\]"),
            ErrorCase("x", altered("x", lambda x: x.int()), "Int"),
            ErrorCase("w_in", altered("w_in", lambda w: w[:, 1:]), r"\[4, 5, 5\]"),
            ErrorCase("w_out", altered("w_in", lambda w: w.double()), "Float"),
            ErrorCase("b_in", altered("b_in", lambda b: b[:, 1:]), r"\[4, 5\]"),
            ErrorCase("w_out", altered("w_out", lambda w: w[0]), r"\[5, 3\]"),
            ErrorCase("b_out", altered("b_out", lambda b: b.double()), "Double"),
            ErrorCase("activation", altered("activation", lambda a: "mish"), '"mish"', ValueError),
        ),
    )

    def test_the_gradient_of_probs_is_differentiable_by_all_it_is_made_of(self) -> None:
        inputs = make(SITUATIONS["plain"], torch.float64, "swiglu", True)
        names = ("x", *EXPERT_WEIGHTS)
        leaf = leaves(inputs, ("probs", *names))
        direction = normal(*inputs["y"].shape).requires_grad_()

        def gradient(direction: Tensor, *values: Tensor) -> Tensor:
            (y,) = self.case(leaf | dict(zip(names, values, strict=True)))
            return torch.autograd.grad(y, leaf["probs"], direction, create_graph=True)[0]

        values = [leaf[n] for n in names]
        assert torch.autograd.gradcheck(gradient, (direction, *values), **GRADCHECK)

    def test_the_gradient_is_every_experts_output_times_the_one_of_y(self) -> None:
        inputs = leaves(make(SITUATIONS["plain"], torch.float64, "geglu", True), ("y", "probs"))
        direction = normal(*inputs["y"].shape)
        (y,) = self.case(inputs)
        y.backward(direction)
        assert torch.equal(inputs["y"].grad, direction)
        for i in range(len(inputs["w_in"])):
            outputs = expert(inputs, i)
            torch.testing.assert_close(
                inputs["probs"].grad[:, i], (outputs * direction).sum(1), rtol=0, atol=1e-12
            )

    @pytest.mark.parametrize("activation", torchmoe.ops.ACTIVATIONS)
    def test_every_activation(self, activation: str) -> None:
        self.test_gradients_are_the_reference(
            SITUATIONS["plain"], torch.float64, {"activation": activation, "bias": True}
        )

    def test_experts_and_tokens_get_no_gradient(self) -> None:
        names = ("x", *EXPERT_WEIGHTS)
        inputs = leaves(make(SITUATIONS["plain"], torch.float64, "swiglu", True), ("y", *names))
        (y,) = self.case(inputs)
        grads = torch.autograd.grad(y.sum(), [inputs[n] for n in names], allow_unused=True)
        assert grads == (None,) * len(names)

    def test_without_probs_no_expert_is_computed(self) -> None:
        inputs = leaves(make(SITUATIONS["plain"], torch.float32, "swiglu", True), ("y",))
        (y,) = self.case(inputs)
        with torch.profiler.profile(acc_events=True) as profile:
            y.sum().backward()
        assert not any("attach_dense" in e.key for e in profile.key_averages() if "bwd" in e.key)
        assert not any("_attach_dense_gradient_backward" in e.key for e in profile.key_averages())

    def test_sizes_of_zero(self) -> None:
        for situation in (Situation("no_width", H=0), Situation("no_inner", I=0)):
            inputs = leaves(make(situation, torch.float32, "silu", True), ("probs",))
            (y,) = self.case(inputs)
            (grad,) = torch.autograd.grad(y, inputs["probs"], torch.ones_like(y))
            expected = inputs["b_out"].sum(1).expand(situation.T, -1)
            torch.testing.assert_close(grad, expected)


def expert(inputs: Inputs, i: int) -> Tensor:
    """E_i(x) for every token, through expert_mlp."""
    num_tokens = len(inputs["x"])
    rest = {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    del rest["y"], rest["probs"]
    slots = {
        "indices": torch.full((num_tokens, 1), i),
        "weights": torch.ones(num_tokens, 1, dtype=rest["x"].dtype),
    }
    return call("expert_mlp", rest | slots)[0]
