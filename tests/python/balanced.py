"""Layers with every way of balancing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchmoe import ops
from torchmoe.losses import LossInputs
from torchmoe.nn import MoE, Routing

B, S, H, INNER, E, K = 3, 7, 6, 5, 8, 2
T = B * S
F64 = torch.float64
RING = (1, 2, 3, 4, 5, 6, 7, 0)
TERMS = (
    "importance_loss",
    "load_loss",
    "local_entropy_loss",
    "global_entropy_loss",
    "mutual_information_loss",
    "router_z_loss",
)


def make(**options: Any) -> MoE:
    return MoE(H, INNER, E, K, **({"dtype": F64} | options))


def largest_logit(given: LossInputs) -> Tensor:
    """A term of the user's own."""
    largest = given.logits.square().amax(1, keepdim=True)
    return ops.mean_over_tokens(largest, token_mask=given.token_mask).squeeze(0)


def shares_of(logits: Tensor, score_function: str = "softmax") -> Tensor:
    p = logits.softmax(-1) if score_function == "softmax" else logits.sigmoid()
    return p / p.sum(-1, keepdim=True)


def counts_of(ids: Tensor) -> Tensor:
    """How often each expert is named: by one loop."""
    counts = torch.zeros(E, dtype=F64)
    for e in ids.flatten().tolist():
        if e >= 0:
            counts[e] += 1
    return counts


def plain_loss(fraction: Tensor, shares: Tensor) -> Tensor:
    """E * sum_i f_i P_i for the shares [T, E] of the counted tokens."""
    return E * (fraction * shares.mean(0)).sum()


def balance(routing: Routing) -> Tensor:
    return routing.losses["load_balancing_loss"]


def gradient_of(loss: Tensor, moe: MoE) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, [moe.router.weight], retain_graph=True)
    return gradient
