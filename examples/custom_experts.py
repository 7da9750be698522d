"""Experts of your own, in the three ways that the layer takes them.

1. `ExpertList`: any modules, one for each expert. The shortest way, but it waits for a GPU.
2. Anything called as experts(x, indices, weights): you do all of the work.
3. A module of that kind made of the library's ops, which sort the rows, multiply and sum.

Each is checked first, the gradients on their own and then the laws of the whole layer, and then
trained in an `MoE` on a small problem.

Shapes: T tokens, H hidden size, E experts, K = top_k, N = T * K rows, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchmoe import ops
from torchmoe.nn import ExpertList, MoE
from torchmoe.testing import certify, gradcheck

HIDDEN, EXPERTS, TOP_K, RANK = 16, 4, 2, 8
STEPS, TOKENS = 200, 256
LAWS = ("gradients", "unrouted_tokens", "accumulation", "recomputation", "determinism")


# 1. A list of modules, which need not be alike. Each is called on its own rows [n, H], n = 0
# included, and returns [n, H]; the list does the rest.


def make_list() -> nn.Module:
    """Two perceptrons of different width, a linear map, and a window along the features."""
    narrow, wide = (
        nn.Sequential(nn.Linear(HIDDEN, width), nn.GELU(), nn.Linear(width, HIDDEN))
        for width in (8, 32)
    )
    window = nn.Conv1d(1, 1, kernel_size=3, padding="same")
    convolution = nn.Sequential(nn.Unflatten(1, (1, HIDDEN)), window, nn.Flatten())
    return ExpertList([narrow, wide, nn.Linear(HIDDEN, HIDDEN), convolution])


# 2. Anything that can be called. One rule: a slot with id -1 was masked or dropped, and gives no
# output and no gradient.


class Scales(nn.Module):
    """An expert is a scale and a shift for each feature, small enough to copy for every slot."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.shift = nn.Parameter(torch.zeros(EXPERTS, HIDDEN))

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """From x [T, H], indices [T, K] and weights [T, K] to y [T, H]."""
        weights = weights.masked_fill(indices < 0, 0).to(x.dtype).unsqueeze(2)  # [T, K, 1]
        ids = indices.clamp(min=0)
        outputs = self.scale[ids] * x.unsqueeze(1) + self.shift[ids]  # [T, K, H]
        return (weights * outputs).sum(1)


# 3. The ops. Rows of unrouted slots come last and are zero; unpermute ignores them.


class LowRank(nn.Module):
    """An expert is up(squared_relu(down(x))): two thin matrices and an activation of our own."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(EXPERTS, RANK, HIDDEN) / HIDDEN**0.5)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, RANK) / RANK**0.5)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """From x [T, H], indices [T, K] and weights [T, K] to y [T, H]."""
        plan = ops.dispatch_plan(indices, EXPERTS)
        rows = ops.permute(x, plan)  # [N, H], sorted by expert
        rows = ops.grouped_linear(rows, self.down, None, plan.expert_offsets)  # [N, R]
        rows = functional.relu(rows).square()
        rows = ops.grouped_linear(rows, self.up, None, plan.expert_offsets)  # [N, H]
        return ops.unpermute(rows, weights, plan)


def check(experts: nn.Module) -> str:
    """Asks for the gradients, for the rule about unrouted slots, and for the laws of a layer."""
    x, weights = torch.randn(5, HIDDEN), torch.rand(5, TOP_K)
    indices = torch.tensor([[0, 1], [2, 0], [3, 2], [-1, 3], [-1, -1]])
    gradcheck(experts, (x, indices, weights))  # of x, weights and every parameter; raises if wrong
    others = weights.masked_fill(indices < 0, 7.0)
    assert torch.equal(experts(x, indices, weights), experts(x, indices, others)), "serves id -1"
    certificate = certify(MoE(HIDDEN, None, EXPERTS, TOP_K, experts=experts), laws=LAWS)
    assert certificate, str(certificate)
    return f"gradients right, {len(certificate.laws)} laws held"


def train(experts: nn.Module) -> tuple[float, float]:
    """The loss before and after training on tokens that four regions scale differently."""
    moe = MoE(HIDDEN, None, EXPERTS, TOP_K, experts=experts)
    torch.manual_seed(1)  # the same tokens for all
    centres, scales = torch.randn(2, EXPERTS, HIDDEN)
    optimizer = torch.optim.Adam(moe.parameters(), lr=0.03)
    losses = []
    for _ in range(STEPS):
        x = torch.randn(TOKENS, HIDDEN)
        wanted = 2 * scales[(x @ centres.T).argmax(1)] * x
        output = moe(x)
        loss = (output.hidden_states - wanted).square().mean()
        optimizer.zero_grad()
        (loss + output.aux_loss).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], sum(losses[-10:]) / 10


def main() -> None:
    """Checks and trains each of the three."""
    torch.set_num_threads(1)  # more are slower at this size
    for make in (make_list, Scales, LowRank):
        torch.manual_seed(0)
        experts = make()
        checked = check(experts)
        first, last = train(experts)
        print(f"{type(experts).__name__:10}  {checked}; loss {first:.2f} -> {last:.2f}")


if __name__ == "__main__":
    main()
