"""Sigmoid scores and a selection bias, as in DeepSeek-V3."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from certify.layers.parts import (
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    Expert,
    assignments,
    flatten,
    project,
    wide,
)


class BiasMoE(nn.Module):
    """Sigmoid scores, a selection bias without gradient, groups and a shared expert: DeepSeek-V3.

    The bias takes part in the choice of experts, never in the weights. In training the layer counts
    tokens in `tokens_per_expert`, once for each forward pass and not again when a checkpoint runs
    it anew; `update_bias()`, called after the optimizer's step, moves the bias and resets the
    counts. It starts at random values, as in the midst of training.
    """

    takes_mask, returns = True, "y"

    def __init__(
        self,
        hidden: int = HIDDEN,
        intermediate: int = INTERMEDIATE,
        experts: int = 8,
        top_k: int = TOP_K,
        *,
        groups: int = 4,
        top_groups: int = 2,
        normalise: bool = True,
        scaling: float = 2.5,
        bias_mean: float = 0.0,
        bias_rate: float = 0.001,
    ) -> None:
        super().__init__()
        self.hidden, self.num_experts, self.top_k = hidden, experts, top_k
        self.groups, self.top_groups = groups, top_groups
        self.normalise, self.scaling, self.bias_rate = normalise, scaling, bias_rate
        self.router = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, intermediate) for _ in range(experts))
        self.shared = Expert(hidden, intermediate)
        self.shared_gate = nn.Linear(hidden, 1, bias=False)
        self.make_state(bias_mean + 0.1 * torch.randn(experts, dtype=torch.float32))

    def make_state(self, bias: Tensor) -> None:
        """The buffers: the bias in float32, the counts as whole numbers."""
        self.register_buffer("expert_bias", bias)
        self.register_buffer("tokens_per_expert", torch.zeros(len(bias), dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """As nn.Module's, but the bias stays in float32."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if self.expert_bias.dtype != bias.dtype:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The output."""
        tokens, valid = flatten(x, mask)
        scores = project(tokens, self.router.weight).sigmoid()
        weights, chosen = self.choose(scores)
        self.count(chosen, valid)
        chosen = chosen.masked_fill(~valid.unsqueeze(1), -1)
        y = self.join(self.combine(tokens, weights, chosen), tokens, valid)
        return y.to(x.dtype).reshape(x.shape)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts, [T, K] each."""
        chosen = self.select(scores + self.expert_bias)
        return self.weigh(scores.gather(1, chosen)), chosen

    def select(self, biased: Tensor) -> Tensor:
        """The best experts of the best groups."""
        best = self.group_scores(biased).topk(self.top_groups, dim=-1).indices
        open_groups = torch.zeros(len(biased), self.groups, dtype=torch.bool, device=biased.device)
        open_groups = self.spread(open_groups.scatter(1, best, True))
        return self.hide(biased, ~open_groups).topk(self.top_k, dim=-1).indices

    def group_scores(self, biased: Tensor) -> Tensor:
        """A group's score: the sum of its two best experts'."""
        members = biased.reshape(len(biased), self.groups, self.num_experts // self.groups)
        return members.topk(2, dim=-1).values.sum(-1)

    def spread(self, open_groups: Tensor) -> Tensor:
        """The experts of the open groups; a group's experts stand side by side."""
        return open_groups.repeat_interleave(self.num_experts // self.groups, dim=1)

    def hide(self, biased: Tensor, closed: Tensor) -> Tensor:
        """The scores without those of closed groups."""
        return biased.masked_fill(closed, float("-inf"))

    def weigh(self, weights: Tensor) -> Tensor:
        """The chosen scores as weights."""
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scaling

    def combine(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs."""
        y = torch.zeros_like(wide(tokens))
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            out = expert(tokens[token]) * weights[token, slot].unsqueeze(1)
            y = y.index_add(0, token, out.to(y.dtype))
        return y

    def join(self, routed: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
        """The routed experts' output plus the gated shared one."""
        shared = self.shared(tokens) * self.shared_gate(tokens).sigmoid()
        return routed + shared * valid.unsqueeze(1)

    def recomputing(self) -> bool:
        """Whether a checkpoint runs the layer again, inside a backward pass."""
        return torch._C._current_graph_task_id() != -1

    def count(self, chosen: Tensor, valid: Tensor) -> None:
        """Add to the counts."""
        if self.training and not self.recomputing():
            with torch.no_grad():
                self.tokens_per_expert += assignments(chosen[valid], self.num_experts).sum(0)

    @torch.no_grad()
    def update_bias(self) -> None:
        """Raise the bias of experts with few tokens, lower that of the others; reset the counts."""
        counts = self.tokens_per_expert.double()
        step = self.bias_rate * (counts.mean() - counts).sign()
        self.expert_bias += step.to(self.expert_bias.dtype)
        self.tokens_per_expert.zero_()
