"""Tokens sorted by expert, and matrix products with a backward pass of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from certify.layers.parts import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, flatten, project, wide


def grouped(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """Rows of expert e times weight[e]; rows after the last expert's give 0."""
    parts = rows.split([*counts, len(rows) - sum(counts)])
    products = [part @ matrix for part, matrix in zip(parts, weight, strict=False)]
    tail = rows.new_zeros(len(parts[-1]), weight.shape[2])
    return torch.cat([*products, tail])


def grouped_outer(rows: Tensor, grad: Tensor, counts: list[int]) -> Tensor:
    """The gradient of weight in `grouped`; 0 for an expert without rows."""
    used = sum(counts)
    pairs = zip(rows[:used].split(counts), grad[:used].split(counts), strict=True)
    return torch.stack([part.T @ out for part, out in pairs])


def silu_and_slope(gate: Tensor) -> tuple[Tensor, Tensor]:
    """SiLU and its derivative."""
    sigmoid = gate.sigmoid()
    return gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))


def gelu_and_slope(gate: Tensor) -> tuple[Tensor, Tensor]:
    """The exact GELU and its derivative."""
    below = torch.special.ndtr(gate)
    return gate * below, below + gate * (-gate.square() / 2).exp() / math.sqrt(2 * math.pi)


class GroupedMM(Function):
    """`grouped` with both its gradients written out."""

    @staticmethod
    def forward(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        """The product."""
        return grouped(rows, weight, counts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs."""
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.save_for_forward(inputs[0], inputs[1])
        ctx.counts = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Gradients of rows and weight."""
        rows, weight = ctx.saved_tensors
        counts = ctx.counts
        return (
            grouped(grad, weight.transpose(1, 2), counts),
            grouped_outer(rows, grad, counts),
            None,
        )

    @staticmethod
    def jvp(ctx: Any, rows_t: Tensor | None, weight_t: Tensor | None, _: None) -> Tensor:
        """The tangent."""
        rows, weight = ctx.saved_tensors
        tangent = torch.zeros_like(grouped(rows, weight, ctx.counts))
        if rows_t is not None:
            tangent = tangent + grouped(rows_t, weight, ctx.counts)
        if weight_t is not None:
            tangent = tangent + grouped(rows, weight_t, ctx.counts)
        return tangent


def glu_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, act: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate, up and weight, in float32 at least."""
    gate, up = wide(hidden).chunk(2, dim=-1)
    value, slope = act(gate)
    grad, column = wide(grad), weight.unsqueeze(1)
    return (
        grad * column * up * slope,
        grad * column * value,
        (grad * value * up).sum(-1).to(weight.dtype),
    )


class WeightedGLU(Function):
    """act(gate) * up * weight for hidden = [gate, up], with its backward pass written out."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, act: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> Tensor:
        """The weighted activation in the dtype of hidden."""
        gate, up = wide(hidden).chunk(2, dim=-1)
        return (act(gate)[0] * up * weight.unsqueeze(1)).to(hidden.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs."""
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.save_for_forward(inputs[0], inputs[1])
        ctx.act = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Gradients of hidden and weight."""
        hidden, weight = ctx.saved_tensors
        d_gate, d_up, d_weight = glu_backward(grad, hidden, weight, ctx.act)
        return torch.cat([d_gate, d_up], dim=-1).to(hidden.dtype), d_weight, None

    @staticmethod
    def jvp(ctx: Any, hidden_t: Tensor | None, weight_t: Tensor | None, _: None) -> Tensor:
        """The tangent."""
        hidden, weight = ctx.saved_tensors
        gate, up = wide(hidden).chunk(2, dim=-1)
        value, slope = ctx.act(gate)
        tangent = torch.zeros_like(value)
        if hidden_t is not None:
            gate_t, up_t = wide(hidden_t).chunk(2, dim=-1)
            tangent = tangent + (slope * gate_t * up + value * up_t) * weight.unsqueeze(1)
        if weight_t is not None:
            tangent = tangent + value * up * weight_t.unsqueeze(1)
        return tangent.to(hidden.dtype)


class GroupedMoE(nn.Module):
    """Tokens sorted by expert, grouped products and a fused activation with the weights in it.

    The weights lie as nn.Linear's do: w_in [E, 2 * intermediate, hidden], gate before up.
    """

    takes_mask, returns = True, "y, logits"
    mm_in: type[Function] = GroupedMM
    mm_out: type[Function] = GroupedMM
    glu: type[Function] = WeightedGLU

    def __init__(
        self,
        hidden: int = HIDDEN,
        intermediate: int = INTERMEDIATE,
        experts: int = EXPERTS,
        top_k: int = TOP_K,
        *,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.hidden, self.num_experts, self.top_k = hidden, experts, top_k
        self.act = {"silu": silu_and_slope, "gelu": gelu_and_slope}[activation]
        self.router = nn.Linear(hidden, experts, bias=False)
        self.w_in = nn.Parameter(torch.randn(experts, 2 * intermediate, hidden) / hidden**0.5)
        self.w_out = nn.Parameter(torch.randn(experts, hidden, intermediate) / intermediate**0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output and the logits [T, E]."""
        tokens, valid = flatten(x, mask)
        logits = project(tokens, self.router.weight)
        weights, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        chosen = chosen.masked_fill(~valid.unsqueeze(1), self.num_experts)
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.num_experts)[: self.num_experts].tolist()
        token = order // self.top_k
        with torch.autocast(x.device.type, enabled=False):
            rows = self.gather(tokens.to(self.w_in.dtype), token)
            out = self.expert_rows(rows, weights.flatten()[order], counts)
            y = self.scatter(out, token, x)
        return y.to(x.dtype), logits

    def gather(self, tokens: Tensor, token: Tensor) -> Tensor:
        """The row of each (token, choice), sorted by expert."""
        return tokens[token]

    def expert_rows(self, rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        """Each row through its expert, times its weight; 0 for rows without an expert."""
        hidden = self.mm_in.apply(rows, self.layout(self.w_in, self.hidden), counts)
        inner = self.glu.apply(hidden, weights, self.act)
        return self.mm_out.apply(inner, self.layout(self.w_out, inner.shape[1]), counts)

    def layout(self, weight: Tensor, size: int) -> Tensor:
        """The weights as [E, in, out]."""
        return weight.transpose(1, 2)

    def scatter(self, out: Tensor, token: Tensor, x: Tensor) -> Tensor:
        """The sum of each token's rows, shaped as x."""
        y = torch.zeros_like(wide(x)).reshape(-1, x.shape[-1])
        return y.index_add(0, token, out.to(y.dtype)).reshape(x.shape)
