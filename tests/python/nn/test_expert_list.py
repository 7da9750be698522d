"""Experts of any shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.testing import assert_close

from plain_moe import gradients
from torchmoe.nn import ExpertList, Experts, MoE

H, INNER, E, K, T = 6, 7, 4, 2, 23
F64 = torch.float64


class SwiGLU(nn.Module):
    """One expert of an Experts, as a module of its own."""

    def __init__(self, experts: Experts, expert: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(experts.gate_up_proj[expert].detach().clone())
        self.down_proj = nn.Parameter(experts.down_proj[expert].detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linear(x, self.gate_up_proj).chunk(2, dim=-1)
        return linear(nn.functional.silu(gate) * up, self.down_proj)


def test_equals_the_stacked_experts() -> None:
    stacked = Experts(H, INNER, E, dtype=F64)
    listed = ExpertList(SwiGLU(stacked, e) for e in range(E))
    assert listed.num_experts == E
    indices = torch.rand(T, E - 1).topk(K).indices  # the last expert gets nothing
    indices[5] = -1
    indices[6, 0] = E
    x, weights = torch.randn(T, H, dtype=F64), torch.rand(T, K, dtype=F64)
    seen = []
    for experts in (stacked, listed):
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        y = experts(leaves[0], indices, leaves[1])
        y.square().sum().backward()
        seen.append([y, leaves[0].grad, leaves[1].grad])
    assert_close(seen[0], seen[1])
    assert (seen[1][0][5] == 0).all()
    got, expected = gradients(listed), gradients(stacked)
    for name in ("gate_up_proj", "down_proj"):
        for e in range(E):
            assert_close(got[f"experts.{e}.{name}"], expected[name][e])
    assert (got[f"experts.{E - 1}.down_proj"] == 0).all()


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_every_expert_runs_and_gets_a_gradient_on_no_rows_too(num_tokens: int) -> None:
    listed = ExpertList(
        nn.Sequential(nn.Linear(H, INNER), nn.ReLU(), nn.Linear(INNER, H)) for _ in "abc"
    )
    moe = MoE(H, None, 3, 1, experts=listed)
    mask = torch.zeros(num_tokens, dtype=torch.bool)
    output = moe(torch.randn(num_tokens, H), token_mask=mask)
    assert (output.hidden_states == 0).all()
    output.hidden_states.sum().backward()
    assert all((gradient == 0).all() for gradient in gradients(listed).values())


def test_experts_of_different_shapes_in_a_layer() -> None:
    moe = MoE(
        H,
        None,
        3,
        2,
        experts=ExpertList(
            [nn.Linear(H, H), nn.Sequential(nn.Linear(H, 2), nn.Linear(2, H)), nn.Identity()]
        ),
    )
    output = moe(torch.randn(2, T, H))
    output.hidden_states.sum().backward()
    assert gradients(moe)
    before = moe.experts.experts[1][0].weight.clone()
    moe.reset_parameters()
    assert not torch.equal(moe.experts.experts[1][0].weight, before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert moe(torch.randn(T, H)).hidden_states.shape == (T, H)


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ExpertList: modules must hold at least one module"):
        ExpertList([])
