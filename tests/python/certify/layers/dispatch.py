"""One-hot dispatch into slots of fixed capacity, as in GShard and Switch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from certify.layers.parts import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    assignments,
    flatten,
    project,
    wide,
)


class DispatchMoE(nn.Module):
    """One-hot dispatch into slots of fixed capacity, as in GShard and Switch.

    A choice beyond the capacity is dropped: it adds 0 to y. drop_policy "position" keeps the first
    tokens, all first choices before all second ones; "probs" keeps the most probable tokens.
    """

    takes_mask, returns = True, "y, aux"

    def __init__(
        self,
        hidden: int = HIDDEN,
        intermediate: int = INTERMEDIATE,
        experts: int = EXPERTS,
        top_k: int = TOP_K,
        *,
        normalise: bool = True,
        capacity_factor: float = 0.75,
        drop_policy: str = "position",
        jitter: float = 0.0,
        recompute: bool = False,
        balance_coef: float = 0.01,
    ) -> None:
        super().__init__()
        self.hidden, self.num_experts, self.top_k = hidden, experts, top_k
        self.normalise, self.jitter, self.recompute = normalise, jitter, recompute
        self.capacity_factor, self.drop_policy = capacity_factor, drop_policy
        self.balance_coef = balance_coef
        self.router = nn.Linear(hidden, experts, bias=False)
        self.w_gate = nn.Parameter(torch.randn(experts, hidden, intermediate) / hidden**0.5)
        self.w_up = nn.Parameter(torch.randn(experts, hidden, intermediate) / hidden**0.5)
        self.w_down = nn.Parameter(torch.randn(experts, intermediate, hidden) / intermediate**0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output and the auxiliary loss."""
        if self.recompute and self.training:
            return self.recomputed(x, mask)
        return self.body(x, mask)

    def recomputed(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The layer run again in the backward pass, with the same noise."""
        return checkpoint(self.body, x, mask, use_reentrant=False)

    def body(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The layer itself."""
        tokens, valid = flatten(x, mask)
        noisy = tokens
        if self.training and self.jitter > 0:
            noisy = tokens * torch.empty_like(tokens).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = project(noisy, self.router.weight)
        probabilities = logits.softmax(-1)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        dispatch = self.dispatch(chosen, valid, logits, probabilities).to(tokens.dtype)
        inputs = torch.einsum("ktec,th->ech", dispatch, tokens)
        inner = F.silu(torch.einsum("ech,ehi->eci", inputs, self.w_gate))
        inner = inner * torch.einsum("ech,ehi->eci", inputs, self.w_up)
        out = torch.einsum("eci,eih->ech", inner, self.w_down)
        y = torch.einsum("ktec,kt,ech->th", wide(dispatch), weights.T, wide(out))
        y = self.dropped(y, tokens, weights, dispatch)
        aux = self.balance_coef * self.balance(probabilities, chosen, valid)
        return y.to(x.dtype).reshape(x.shape), aux

    def dispatch(
        self, chosen: Tensor, valid: Tensor, logits: Tensor, probabilities: Tensor
    ) -> Tensor:
        """Whether choice k of token t has slot c of expert e, [K, T, E, C]."""
        capacity = math.ceil(
            self.capacity_factor * self.top_k * int(valid.sum()) / self.num_experts
        )
        onehot = chosen.T.unsqueeze(-1) == torch.arange(self.num_experts, device=chosen.device)
        position, kept, slots = self.places(onehot, valid, logits, probabilities, capacity)
        slot = torch.arange(slots, device=chosen.device)
        return kept.unsqueeze(-1) & (position.unsqueeze(-1) == slot)

    def places(
        self, onehot: Tensor, valid: Tensor, logits: Tensor, probabilities: Tensor, capacity: int
    ) -> tuple[Tensor, Tensor, int]:
        """The slot of each choice and whether it is kept, [K, T, E]; the slots of an expert."""
        assigned = onehot & valid.unsqueeze(-1)
        if self.drop_policy == "probs":
            key = self.drop_key(assigned.any(0), logits, probabilities)
            best = key.topk(min(capacity, len(key)), dim=0).indices
            assigned = assigned & torch.zeros_like(key, dtype=torch.bool).scatter(0, best, True)
        position = assigned.flatten(0, 1).cumsum(0).reshape(assigned.shape) - 1
        return position, assigned & (position < capacity), capacity

    def drop_key(self, assigned: Tensor, logits: Tensor, probabilities: Tensor) -> Tensor:
        """By what the tokens of an expert are ranked, [T, E]."""
        return probabilities.masked_fill(~assigned, float("-inf"))

    def dropped(self, y: Tensor, tokens: Tensor, weights: Tensor, dispatch: Tensor) -> Tensor:
        """What becomes of dropped choices: nothing."""
        return y

    def balance(self, probabilities: Tensor, chosen: Tensor, valid: Tensor) -> Tensor:
        """The balancing loss, of the choices before any is dropped."""
        number = valid.sum().clamp(min=1)
        counts = assignments(chosen, self.num_experts) * valid.unsqueeze(1)
        share = counts.sum(0) / (number * self.top_k)
        mean = (probabilities * valid.unsqueeze(1)).sum(0) / number
        return self.num_experts * (share * mean).sum()
