"""Counts and shares of slots, and the further terms of a layer's auxiliary loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import torchmoe.losses
from torchmoe import ops
from torchmoe._checks import check_choice, check_not_negative, shown
from torchmoe.losses import LOSSES, Loss

FRACTIONS_FROM = ("batch", "sequence", "global_batch", "history")
FRACTION_CHOICES = ("all", "first")


def count(indices: Tensor, num_experts: int) -> Tensor:
    """Slots per expert, [E], of the ids [T, K]."""
    return ops.dispatch_plan(indices, num_experts).expert_offsets.diff()


def count_by_sequence(chosen: Tensor, sequences: int, length: int, num_experts: int) -> Tensor:
    """Slots per sequence and expert, [B, E], of the choices [B * S, K]."""
    slots = chosen.reshape(sequences, length * chosen.shape[1])  # [B, S * K]
    # Every sequence has experts of its own, which one plan counts.
    first = num_experts * torch.arange(sequences, device=chosen.device).unsqueeze(1)
    routed = (slots >= 0) & (slots < num_experts)
    counts = count((slots + first).where(routed, -1), sequences * num_experts)
    return counts.view(sequences, num_experts)


def shares(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """The counts over their sum along the last dimension; 0 where nothing is counted."""
    if counts.is_floating_point():
        return counts.to(dtype)
    return counts.to(dtype) / counts.sum(dim=-1, keepdim=True).clamp(min=1)


def check_losses(
    losses: Sequence[tuple[str | Loss, float]], z_loss_weight: float
) -> tuple[tuple[tuple[str | Loss, float], ...], float]:
    """The terms without router_z_loss, and the weight of that one, wherever it is given."""
    check_not_negative("MoE", "z_loss_weight", z_loss_weight)
    if not isinstance(losses, Sequence) or isinstance(losses, str):
        raise TypeError(f"MoE: losses must be pairs of a term and its weight, got {shown(losses)}")
    weights = {} if z_loss_weight == 0 else {"router_z_loss": z_loss_weight}
    rest = []
    for pair in losses:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"MoE: losses must be pairs of a term and its weight, got {pair!r}")
        term, weight = pair
        if isinstance(term, str):
            check_choice("MoE", "losses", term, LOSSES)
        elif not callable(term) or not hasattr(term, "__name__"):
            raise TypeError(
                "MoE: losses must hold a name or a function with a __name__ in each pair, "
                f"got {term!r}"
            )
        elif getattr(torchmoe.losses, term.__name__, None) is term:
            raise TypeError(
                f'MoE: losses must have "{term.__name__}" for that function, which takes other '
                "arguments than a term of a layer, got the function"
            )
        name = name_of(term)
        weight = check_not_negative("MoE", f'the weight of "{name}"', weight)
        if name in weights or name == "load_balancing_loss":
            raise ValueError(
                "MoE: losses must name every term once, and load_balancing_loss by balance_weight, "
                f'got "{name}"'
            )
        weights[name] = weight
        if term != "router_z_loss":
            rest.append((term, weight))
    named = {term: weight for term, weight in losses if isinstance(term, str)}
    return tuple(rest), named.get("router_z_loss", z_loss_weight)


def name_of(term: str | Loss) -> str:
    """What a term is called in `Routing.losses`."""
    return term if isinstance(term, str) else term.__name__


def function_of(term: str | Loss) -> Loss:
    """What computes a term."""
    return LOSSES[term] if isinstance(term, str) else term
