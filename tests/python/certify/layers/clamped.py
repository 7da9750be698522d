"""Biased experts with a clamped activation, as in gpt-oss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from certify.layers.parts import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, flatten, project, wide


class ClampedMoE(nn.Module):
    """Biased experts with interleaved gate and up and a clamped activation, as in gpt-oss."""

    takes_mask, returns = True, "y, logits"

    def __init__(
        self,
        hidden: int = HIDDEN,
        intermediate: int = INTERMEDIATE,
        experts: int = EXPERTS,
        top_k: int = TOP_K,
        *,
        limit: float = 0.7,
        alpha: float = 1.702,
    ) -> None:
        super().__init__()
        self.hidden, self.num_experts, self.top_k = hidden, experts, top_k
        self.limit, self.alpha = limit, alpha
        self.router = nn.Linear(hidden, experts)
        self.w_in = nn.Parameter(torch.randn(experts, hidden, 2 * intermediate) / hidden**0.5)
        self.b_in = nn.Parameter(torch.randn(experts, 2 * intermediate) / 4)
        self.w_out = nn.Parameter(torch.randn(experts, intermediate, hidden) / intermediate**0.5)
        self.b_out = nn.Parameter(torch.randn(experts, hidden) / 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output and the logits [T, E]."""
        tokens, valid = flatten(x, mask)
        logits = project(tokens, self.router.weight) + wide(self.router.bias)
        best, chosen = logits.topk(self.top_k, dim=-1)
        weights = best.softmax(-1)
        chosen = chosen.masked_fill(~valid.unsqueeze(1), -1)
        y = torch.zeros_like(wide(tokens))
        for expert in range(self.num_experts):
            token, slot = torch.where(chosen == expert)
            y = self.add(y, tokens, token, weights[token, slot], expert)
        return y.to(x.dtype).reshape(x.shape), logits

    def add(self, y: Tensor, tokens: Tensor, token: Tensor, weights: Tensor, expert: int) -> Tensor:
        """y plus the weighted outputs of one expert for its tokens."""
        out = self.apply_expert(tokens[token], expert) * weights.unsqueeze(1)
        return y.index_add(0, token, out.to(y.dtype))

    def apply_expert(self, rows: Tensor, expert: int) -> Tensor:
        """One expert's output."""
        gate, up = self.split(rows @ self.w_in[expert] + self.b_in[expert])
        gate, up = self.clamp(gate, up)
        inner = (up + 1) * gate * (self.alpha * gate).sigmoid()
        return inner @ self.w_out[expert] + self.b_out[expert]

    def split(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up, which alternate."""
        return both[..., ::2], both[..., 1::2]

    def clamp(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Gate from above, up from both sides."""
        return gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
