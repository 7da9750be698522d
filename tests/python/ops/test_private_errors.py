"""What the backward ops refuse: they can be called alone, so they check what only they take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from op_case import Inputs, call, map_tensors
from situations import SITUATIONS, normal

SITUATION = SITUATIONS["dropped"]


def inputs_of(op: str) -> Inputs:
    s, plan = SITUATION, SITUATION.plan()
    rows, n = s.T * s.K, torch.float32
    x, logits = normal(s.T, s.H, dtype=n), normal(s.T, s.E, dtype=n)
    names = {"score_function": "softmax", "normalize": "topk", "estimator": "exact"}
    offsets = plan["expert_offsets"]
    mlp = {
        "x": x,
        "weights": normal(s.T, s.K, dtype=n),
        "w_in": normal(s.E, s.I, s.H, dtype=n),
        "b_in": None,
        "w_out": normal(s.E, s.H, s.I, dtype=n),
        "b_out": None,
        **plan,
        "pre": normal(rows, s.I, dtype=n),
        "activation": "gelu",
        "output_mask": [True] * 6,
    }
    inputs: dict[str, Inputs] = {
        "_router_logits_backward": {
            "grad": logits,
            "x": x,
            "weight": normal(s.E, s.H, dtype=n),
            "output_mask": [True] * 3,
        },
        "_gate_weights_backward": {
            "grad": normal(s.T, s.K, dtype=n),
            "logits": logits,
            "indices": s.indices(),
            **names,
        },
        "_permute_backward": {"grad": normal(rows, s.H, dtype=n), **plan},
        "_unpermute_backward": {
            "grad": x,
            "rows": normal(rows, s.H, dtype=n),
            "weights": normal(s.T, s.K, dtype=n),
            **plan,
        },
        "_grouped_linear_backward": {
            "grad": normal(rows, s.I, dtype=n),
            "rows": normal(rows, s.H, dtype=n),
            "weight": normal(s.E, s.I, s.H, dtype=n),
            "expert_offsets": offsets,
            "output_mask": [True] * 3,
        },
        "_expert_mlp_backward": {"grad": x, **mlp},
        "_load_balancing_loss_backward": {
            "grad": normal(dtype=n),
            "logits": logits,
            "fraction": normal(s.E, dtype=n),
            "score_function": "softmax",
        },
        "_router_z_loss_backward": {"grad": normal(dtype=n), "logits": logits},
        "_attach_dense_gradient_backward": {
            "grad": x,
            **{name: mlp[name] for name in ("x", "w_in", "b_in", "w_out", "b_out", "activation")},
        },
        "_mean_over_tokens_backward": {
            "grad": normal(2, s.E, dtype=n),
            "num_tokens": s.T,
            "token_mask": torch.rand(2, s.T) < 0.5,
        },
    }
    return inputs[op]


OPS = (
    "_router_logits_backward",
    "_gate_weights_backward",
    "_permute_backward",
    "_unpermute_backward",
    "_grouped_linear_backward",
    "_expert_mlp_backward",
    "_load_balancing_loss_backward",
    "_router_z_loss_backward",
    "_attach_dense_gradient_backward",
)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("op", OPS)
def test_a_gradient_of_another_shape(op: str, device: str) -> None:
    inputs = map_tensors(inputs_of(op), lambda t: t.to(device))
    call(op, inputs)
    changes: list[Callable[[Tensor], Tensor]] = [lambda g: g[None]]
    if inputs["grad"].dim():
        changes += [lambda g: g[1:], lambda g: g[0]]
    for change in changes:
        with pytest.raises(RuntimeError, match=rf"^{op}: grad must [\s\S]*, got shape \["):
            call(op, inputs | {"grad": change(inputs["grad"])})


@pytest.mark.parametrize("op", OPS)
def test_a_gradient_on_another_device(op: str) -> None:
    """Its elements would be read where there are none."""
    inputs = inputs_of(op)
    # The gradient must be on the device of the permutation's plan.
    name = "expert_offsets" if op == "_permute_backward" else "grad"
    with pytest.raises(RuntimeError, match=rf"^{op}: {name} must be on the device of"):
        call(op, inputs | {"grad": inputs["grad"].to("meta")})


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("op", [*OPS, "_mean_over_tokens_backward"])
def test_a_gradient_that_is_not_floating(op: str, device: str) -> None:
    inputs = map_tensors(inputs_of(op), lambda t: t.to(device))
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(RuntimeError, match=rf"^{op}: grad must be float32, float64"):
            call(op, inputs | {"grad": inputs["grad"].to(dtype)})


@pytest.mark.parametrize("op", [*OPS, "_mean_over_tokens_backward"])
def test_a_gradient_of_another_floating_dtype(op: str) -> None:
    """It is read as what it is."""
    inputs = inputs_of(op)
    grad = inputs["grad"].bfloat16()
    expected = call(op, inputs | {"grad": grad.float()})
    for dtype in (torch.float64, torch.bfloat16):
        actual = call(op, inputs | {"grad": grad.to(dtype)})
        for a, e in zip(actual, expected, strict=True):
            # Some ops answer in the type of the gradient.
            torch.testing.assert_close(a.float(), e, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("change", [Tensor.double, lambda pre: pre.to("meta")])
def test_a_pre_activation_of_another_kind(change: Callable[[Tensor], Tensor]) -> None:
    op = "_expert_mlp_backward"
    inputs = inputs_of(op)
    with pytest.raises(RuntimeError, match=rf"^{op}: pre must"):
        call(op, inputs | {"pre": change(inputs["pre"])})


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_pre_activation_of_another_shape(device: str) -> None:
    inputs = map_tensors(inputs_of("_expert_mlp_backward"), lambda t: t.to(device))
    with pytest.raises(RuntimeError, match=r"^_expert_mlp_backward: pre must .*, got shape"):
        call("_expert_mlp_backward", inputs | {"pre": inputs["pre"][:0]})


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("op", ["_expert_mlp", "_expert_mlp_backward"])
def test_a_plan_over_other_experts(op: str, device: str) -> None:
    """More experts than there are weights would be read past their end."""
    inputs = inputs_of("_expert_mlp_backward")
    if op == "_expert_mlp":
        for name in ("grad", "pre", "output_mask"):
            del inputs[name]
        inputs["save_pre"] = True
    inputs = map_tensors(inputs, lambda t: t.to(device))
    offsets = inputs["expert_offsets"]
    message = r"^_?expert_mlp(_backward)?: expert_offsets must .*, got shape"
    for other in (offsets[:-1], torch.cat((offsets, offsets[-1:]))):
        with pytest.raises(RuntimeError, match=message):
            call(op, inputs | {"expert_offsets": other})


@pytest.mark.parametrize("op", ["_expert_mlp", "_expert_mlp_backward"])
def test_wide_results_have_no_derivative(op: str) -> None:
    """They are parts of a sum: a derivative of one would lack the others'."""
    inputs = inputs_of("_expert_mlp_backward") | {"wide": True}
    if op == "_expert_mlp":
        for name in ("grad", "pre", "output_mask"):
            del inputs[name]
        inputs["save_pre"] = True
    message = f"^{op}: wide must be false where an input requires a gradient or has a tangent"
    for name in ("x", "weights", "w_out"):
        leaf = inputs[name].clone().requires_grad_()
        with pytest.raises(RuntimeError, match=message):
            call(op, inputs | {name: leaf})
        with torch.no_grad():
            call(op, inputs | {name: leaf})
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
            call(
                op,
                inputs | {name: forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))},
            )


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_mean_with_another_mask(device: str) -> None:
    """The gradient of a mean has any shape; the mask must fit it."""
    op = "_mean_over_tokens_backward"
    inputs = map_tensors(inputs_of(op), lambda t: t.to(device))
    call(op, inputs)
    mask = inputs["token_mask"]
    for change in ({"grad": inputs["grad"][1:]}, {"num_tokens": 5}, {"token_mask": mask[0]}):
        with pytest.raises(RuntimeError, match=rf"^{op}: token_mask must .*, got shape \["):
            call(op, inputs | change)
    with pytest.raises(RuntimeError, match=rf"^{op}: grad must be \[..., num_columns\], got"):
        call(op, inputs | {"grad": inputs["grad"][0, 0]})


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_router_of_another_width(device: str) -> None:
    inputs = map_tensors(inputs_of("_router_logits_backward"), lambda t: t.to(device))
    with pytest.raises(RuntimeError, match=r"^router_logits: weight must .*, got shape"):
        call("_router_logits_backward", inputs | {"weight": inputs["weight"][:, :-1]})
