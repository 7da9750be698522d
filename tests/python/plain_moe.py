"""The layer as a loop over tokens in plain PyTorch, to compare values and gradients with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from torchmoe.nn import MoE, Routing


def plain_weights(
    logits: Tensor, experts: Iterable[int], score_function: str, normalize: str
) -> Tensor:
    """One token's combine weights for the experts it chose."""
    probs = logits.softmax(-1) if score_function == "softmax" else logits.sigmoid()
    chosen = probs[list(experts)]
    return chosen / chosen.sum() if normalize == "topk" else chosen


def plain_moe(
    moe: MoE, x: Tensor, *, kept: Tensor, score_function: str, normalize: str
) -> tuple[Tensor, Tensor]:
    """(y, logits) of a swiglu layer without bias; `kept` [T, K] says which slots survive."""
    logits = linear(x, moe.router.weight)
    rows = []
    for t in range(x.shape[0]):
        chosen = logits[t].argsort(descending=True)[: moe.top_k].tolist()
        weights = plain_weights(logits[t], chosen, score_function, normalize)
        y = torch.zeros_like(x[t])
        for j, e in enumerate(chosen):
            if kept[t, j]:
                gate, up = linear(x[t], moe.experts.gate_up_proj[e]).chunk(2)
                y = y + weights[j] * linear(silu(gate) * up, moe.experts.down_proj[e])
        rows.append(y)
    return torch.stack(rows), logits


def plain_balance(logits: Tensor, tokens_per_expert: Tensor, top_k: int) -> Tensor:
    """E * sum_i f_i P_i for softmax scores."""
    share = tokens_per_expert / (top_k * logits.shape[0])
    return logits.shape[1] * (share * logits.softmax(-1).mean(0)).sum()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter's gradient; every parameter must have one."""
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


def tensors_of(routing: Routing) -> dict[str, Tensor]:
    """The tensors in a routing, by name."""
    found = {name: value for name, value in routing._asdict().items() if torch.is_tensor(value)}
    return found | routing.losses
