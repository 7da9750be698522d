"""router_z_loss: mean of logsumexp(logits)^2."""

from __future__ import annotations

import math

import torch

import reference
import torchmoe
from gradient_harness import DifferentiableOpTests
from op_case import Autocast, ErrorCase, Inputs, OpCase, altered, run, wide_dtype
from situations import SITUATIONS, Situation, normal


def make(s: Situation, dtype: torch.dtype, groups: tuple[int, ...], mask: bool) -> Inputs:
    return {
        "logits": normal(*groups, s.T, s.E, dtype=dtype),
        "token_mask": torch.rand(*groups, s.T) < 0.6 if mask else None,
    }


def private(inputs: Inputs) -> list[tuple[str, Inputs]]:
    grad = normal(dtype=wide_dtype(inputs["logits"].dtype))
    return [("_router_z_loss_backward", {"grad": grad, **inputs})]


class TestRouterZLoss(DifferentiableOpTests):
    case = OpCase(
        name="router_z_loss",
        schema="router_z_loss(Tensor logits, *, Tensor? token_mask=None) -> Tensor",
        make=make,
        reference=reference.router_z_loss,
        wrapper=lambda inputs: torchmoe.ops.router_z_loss(**inputs),
        situations=("plain", "single_expert", "one_token", "no_tokens", "many", "large"),
        variants=(
            {"groups": (), "mask": True},
            {"groups": (), "mask": False},
            {"groups": (2, 3), "mask": True},
        ),
        result_is_wide=True,
        differentiable=("logits",),
        autocast=Autocast(torch.float32, ("logits",)),
        private=private,
        errors=(
            ErrorCase("logits", altered("logits", lambda t: t[0, 0]), r"\[\]"),
            ErrorCase("logits", altered("logits", lambda t: t[:, :0]), r"\[6, 0\]"),
            ErrorCase("logits", altered("logits", lambda t: t.long()), "Long"),
            ErrorCase("token_mask", altered("token_mask", lambda m: m[1:]), r"\[5\]"),
            ErrorCase("token_mask", altered("token_mask", lambda m: m[:, None]), r"\[6, 1\]"),
            ErrorCase("token_mask", altered("token_mask", lambda m: m.long()), "Long"),
        ),
    )

    def test_one_token_without_leading_dimensions(self) -> None:
        loss = torchmoe.ops.router_z_loss(torch.zeros(4))
        torch.testing.assert_close(loss.item(), math.log(4.0) ** 2)

    def test_large_logits_do_not_overflow(self) -> None:
        logits = torch.tensor([[1e4, 1e4], [-1e4, -1e4]])
        expected = reference.router_z_loss(logits)
        torch.testing.assert_close(torchmoe.ops.router_z_loss(logits).double(), expected)

    def test_masked_tokens_do_not_count(self, variant: Inputs) -> None:
        inputs = make(SITUATIONS["plain"], torch.float32, **(variant | {"mask": True}))
        counted = inputs["token_mask"]
        poisoned = inputs | {"logits": inputs["logits"].masked_fill(~counted[..., None], math.nan)}
        clean, dirty = (run(self.case, i, ("logits",)) for i in (inputs, poisoned))
        assert torch.equal(dirty[0][0], clean[0][0])
        assert torch.equal(dirty[1][0], clean[1][0])
        assert bool((dirty[1][0][~counted] == 0).all())

    def test_no_counted_token_is_zero(self) -> None:
        logits = torch.full((3, 4), math.nan, requires_grad=True)
        loss = torchmoe.ops.router_z_loss(logits, token_mask=torch.zeros(3, dtype=torch.bool))
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0.0
        assert torch.equal(grad, torch.zeros(3, 4))

    def test_a_row_of_minus_inf_gets_no_gradient(self) -> None:
        logits = torch.tensor([[-math.inf] * 4, [0.0] * 4], requires_grad=True)
        loss = torchmoe.ops.router_z_loss(logits)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.item() == math.inf
        assert torch.equal(grad[0], torch.zeros(4))
        torch.testing.assert_close(grad[1], torch.full((4,), math.log(4.0) / 4))
