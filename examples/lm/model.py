"""A decoder-only transformer over bytes whose feed-forward is a mixture of experts, or dense.

Shapes: B sequences, S bytes each, H hidden size, N heads, D head size, E experts, K experts a byte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lm.routers import READS_TOKEN_IDS, ROUTERS
from torchmoe.nn import (
    Balance,
    Capacity,
    ExpertCommunication,
    Experts,
    Gate,
    MoE,
    MoEOutput,
    Routing,
)

VOCABULARY = 256  # a token is a byte
HEAD_SIZE = 32
FEED_FORWARDS = ("moe", "dense")
OVERFLOWS = ("drop", "next_best")
BALANCES = ("loss", "bias", "none")
BALANCE_WEIGHT = 0.01  # of the balancing loss
BIAS_RATE = 0.001  # by which the selection bias moves in a step


@dataclass(frozen=True)
class ModelConfig:
    """What the model's parameters and computation depend on."""

    layers: int
    hidden_size: int
    feed_forward: str
    intermediate_size: int
    experts: int
    top_k: int
    capacity_factor: float | None
    order: str
    overflow: str
    balance: str
    router: str
    communication: bool
    estimator: str
    normalize: str | None
    context: int


class LMOutput(NamedTuple):
    """What one forward pass gives."""

    logits: Tensor  # [B, S, VOCABULARY]
    aux_loss: Tensor  # scalar, summed over the layers, ready to add to the task loss
    routings: list[Routing]  # one per layer, none of a dense model


class Attention(nn.Module):
    """Self-attention with rotary positions."""

    cos: Tensor
    sin: Tensor

    def __init__(self, hidden_size: int, context: int) -> None:
        """Makes the two projections and the table of rotations."""
        super().__init__()
        self.heads = hidden_size // HEAD_SIZE
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        frequency = 10_000 ** (-torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)  # [D/2]
        angle = torch.arange(context)[:, None] * frequency  # [context, D/2]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        nn.init.zeros_(self.out.weight)  # starts by adding nothing to the residual stream

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Lets bytes look at each other, [B, S, H] to the same.

        Each looks at itself and those before it; with token_mask [B, S], bool, at all bytes where
        that is True.
        """
        batch, length, hidden_size = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, HEAD_SIZE)  # [B, S, 3, N, D]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, N, S, D] each
        q, k = self.rotate(q), self.rotate(k)
        seen = None if token_mask is None else token_mask[:, None, None, :]  # [B, 1, 1, S]
        y = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None
        )  # [B, N, S, D]
        y = y.transpose(1, 2).reshape(batch, length, hidden_size)  # [B, S, H]
        return cast(Tensor, self.out(y))

    def rotate(self, x: Tensor) -> Tensor:
        """Turns each pair of features by an angle that grows with the position, [B, N, S, D]."""
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]  # [S, D/2]
        a, b = x.chunk(2, dim=-1)  # [B, N, S, D/2] each
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)  # [B, N, S, D]


class DenseFeedForward(nn.Module):
    """SwiGLU, as wide as the experts that a byte visits are together."""

    def __init__(self, config: ModelConfig) -> None:
        """Makes the two projections."""
        super().__init__()
        width = config.top_k * config.intermediate_size
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Works on each byte alone, [B, S, H] to the same."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # [B, S, K * I] each
        return cast(Tensor, self.down_proj(functional.silu(gate) * up))


def make_moe(config: ModelConfig, layer: int) -> MoE:
    """The experts' layer of the block with this number."""
    capacity = None
    if config.capacity_factor is not None:
        # In evaluation an expert takes all that it is asked for. Which bytes it drops in training
        # may depend on later bytes, and a held-out loss must not know those.
        capacity = Capacity(
            config.capacity_factor,
            eval_factor=config.experts,
            order=config.order,
            overflow=config.overflow,
        )
    experts = None
    if config.communication:
        experts = ExpertCommunication(
            Experts(config.hidden_size, config.intermediate_size, config.experts),
            config.hidden_size,
            config.experts,
        )
    make_router = ROUTERS[config.router]
    return MoE(
        config.hidden_size,
        config.intermediate_size,
        config.experts,
        config.top_k,
        gate=Gate(estimator=config.estimator, normalize=config.normalize),
        capacity=capacity,
        balance=Balance(
            weight=BALANCE_WEIGHT if config.balance == "loss" else 0.0,
            fraction_from="global_batch",  # of all processes
            selection_bias_rate=BIAS_RATE if config.balance == "bias" else 0.0,
        ),
        router=make_router(config.hidden_size, config.experts, config.top_k, layer),
        experts=experts,
    )


class Block(nn.Module):
    """Attention, then the feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """Makes the two halves and their norms."""
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size)
        self.attention = Attention(config.hidden_size, config.context)
        self.feed_forward_norm = nn.RMSNorm(config.hidden_size)
        is_dense = config.feed_forward == "dense"
        self.feed_forward = DenseFeedForward(config) if is_dense else make_moe(config, layer)
        self.routes_by_id = not is_dense and config.router in READS_TOKEN_IDS

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, MoEOutput | None]:
        """Gives the new residual stream [B, S, H] and what an experts' layer reports."""
        x = x + self.attention(self.attention_norm(x))
        inputs = {"router_input": tokens} if self.routes_by_id else {}
        output = self.feed_forward(self.feed_forward_norm(x), **inputs)
        if isinstance(output, Tensor):
            return x + output, None
        return x + output.hidden_states, output


class ByteLM(nn.Module):
    """Predicts each next byte from up to `context` bytes before it."""

    def __init__(self, config: ModelConfig) -> None:
        """Makes the layers and draws their parameters from torch's default generator."""
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, VOCABULARY, bias=False)
        nn.init.zeros_(self.head.weight)  # starts with even odds, 8 bits per byte

    @property
    def moes(self) -> list[MoE]:
        """The experts' layer of each block, none of a dense model."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def forward(self, tokens: Tensor) -> LMOutput:
        """Scores every next byte; `tokens` is int64 [B, S] with S at most `context`."""
        x = self.embedding(tokens)  # [B, S, H]
        outputs = []
        for block in self.blocks:
            x, output = block(x, tokens)
            if output is not None:
                outputs.append(output)
        logits = self.head(self.norm(x))  # [B, S, VOCABULARY]
        losses = [output.aux_loss for output in outputs]
        aux_loss = torch.stack(losses).sum() if losses else logits.new_zeros(())
        return LMOutput(logits, aux_loss, [output.routing for output in outputs])

    def update(self, routings: list[Routing]) -> None:
        """Lets each layer move what it remembers, once per optimizer step."""
        for moe, routing in zip(self.moes, routings, strict=True):
            moe.update(routing)

    def count_parameters(self) -> tuple[int, int]:
        """All parameters, and those that work on one byte."""
        total = sum(parameter.numel() for parameter in self.parameters())
        parts = [module for module in self.modules() if isinstance(module, Experts)]
        experts = sum(parameter.numel() for part in parts for parameter in part.parameters())
        return total, total - experts + experts * self.config.top_k // self.config.experts


def loss_per_row(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss in nats per byte of each row: [B]; logits [B, S, VOCABULARY], targets [B, S]."""
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(dim=1)


def bits(nats: float) -> float:
    """The same amount of information in bits."""
    return nats / math.log(2)
