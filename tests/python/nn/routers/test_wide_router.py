"""A router in float32 over tokens of 16 bits, as is usual in the field."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torchmoe.nn import CosineRouter, ExpertChoiceRouter, MoE, Router, SequenceRouter

H, INNER, E, K = 8, 6, 4, 2

ROUTERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Router(H, E, bias=True),
    "jitter": lambda: Router(H, E, input_jitter=0.1),
    "cosine": lambda: CosineRouter(H, E),
    "sequence": lambda: SequenceRouter(Router(H, E)),
    "expert_choice": lambda: ExpertChoiceRouter(Router(H, E), K),
}


def layer(name: str, narrow: torch.dtype, wide: torch.dtype) -> MoE:
    moe = MoE(H, INNER, E, K, router=ROUTERS[name]()).to(narrow)
    moe.router.to(wide)
    return moe


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
    ],
)
@pytest.mark.parametrize("name", list(ROUTERS))
def test_trains_and_evaluates_alike(name: str, narrow: torch.dtype, wide: torch.dtype) -> None:
    moe = layer(name, narrow, wide)
    x = torch.randn(3, 5, H).to(narrow).requires_grad_()
    output = moe(x)
    (output.hidden_states.float().square().sum() + output.aux_loss).backward()
    assert output.hidden_states.dtype == narrow
    assert output.routing.logits.dtype == wide
    assert x.grad.dtype == narrow
    for parameter in moe.router.parameters():
        assert parameter.grad.dtype == wide
        assert bool(parameter.grad.isfinite().all())
    moe.eval()
    evaluated = moe(x)
    if name in ("linear", "expert_choice"):
        weight, bias = (
            (moe.router.weight, moe.router.bias)
            if name == "linear"
            else (moe.router.router.weight, None)
        )
        expected = torch.nn.functional.linear(x.detach().to(wide).view(-1, H), weight, bias)
        atol = 4 * H * torch.finfo(wide).eps
        torch.testing.assert_close(evaluated.routing.logits, expected, atol=atol, rtol=0)
        assert torch.equal(output.routing.logits, evaluated.routing.logits)


def test_the_rounding_of_the_router_is_gone() -> None:
    """Weights that bfloat16 cannot tell apart rank the experts."""
    moe = MoE(H, INNER, 2, 1).bfloat16()
    moe.router.float()
    with torch.no_grad():
        moe.router.weight.fill_(1.0)
        moe.router.weight[1] += 1e-4
    x = torch.ones(3, H, dtype=torch.bfloat16)
    assert moe(x).routing.selected.tolist() == [[1]] * 3


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("training", [True, False])
def test_tokens_wider_than_the_router(name: str, training: bool) -> None:
    router = ROUTERS[name]().train(training)
    with pytest.raises(RuntimeError, match=r"^router_logits: x must have the dtype of weight"):
        router(torch.randn(3, H, dtype=torch.float64))


def test_neither_of_two_16_bit_types_is_the_wider() -> None:
    router = Router(H, E).half()
    x: Tensor = torch.randn(3, H).bfloat16()
    with pytest.raises(RuntimeError, match=r"^router_logits: x must have .*\(Half\), got BFloat16"):
        router(x)
