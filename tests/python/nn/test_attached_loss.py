"""The layer that returns one tensor."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from plain_moe import gradients
from torchmoe.nn import Balance, MoE, MoEOutput, WithAttachedLoss

H, INNER, E, K, T = 6, 7, 5, 2, 23


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_trains_as_the_added_loss_does(scale: float) -> None:
    moe = MoE(H, INNER, E, K, balance=Balance(weight=0.7, z_loss_weight=0.3))
    model = nn.Sequential(nn.Linear(H, H), WithAttachedLoss(moe, scale=scale), nn.Linear(H, 1))
    x = torch.randn(2, T, H)
    (scale * model(x).square().mean()).backward()
    got = gradients(model)
    model.zero_grad()

    output = moe(model[0](x))
    (scale * (model[2](output.hidden_states).square().mean() + output.aux_loss)).backward()
    assert_close(got, gradients(model))


def test_a_hook_sees_the_whole_output() -> None:
    layer = WithAttachedLoss(MoE(H, INNER, E, K))
    seen: list[MoEOutput] = []
    layer.moe.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(T, H)
    mask = torch.rand(T) > 0.5
    y = layer(x, token_mask=mask)
    assert torch.equal(y, seen[0].hidden_states)
    assert torch.equal(seen[0].routing.token_mask, mask)
    layer.moe.update(seen[0].routing)


def test_parameter_names() -> None:
    assert "moe.router.weight" in WithAttachedLoss(MoE(H, INNER, E, K)).state_dict()


def test_around_a_compiled_layer() -> None:
    moe = MoE(H, INNER, E, K)
    x = torch.randn(T, H)
    compiled = torch.compile(moe, backend="eager")
    assert torch.equal(WithAttachedLoss(compiled)(x), moe(x).hidden_states)


def test_around_a_module_that_returns_less() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = MoE(H, INNER, E, K)

        def forward(self, x: torch.Tensor, **options: object) -> torch.Tensor:
            return self.moe(x).hidden_states

    with pytest.raises(TypeError, match=r"^WithAttachedLoss: moe must return a MoEOutput, got a t"):
        WithAttachedLoss(First())(torch.randn(T, H))


def test_around_something_else() -> None:
    with pytest.raises(TypeError, match=r"^WithAttachedLoss: moe must be a MoE, got Linear$"):
        WithAttachedLoss(nn.Linear(H, H))
