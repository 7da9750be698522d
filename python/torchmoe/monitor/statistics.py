"""Statistics of how a layer routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchmoe import ops
from torchmoe._checks import shown
from torchmoe.nn.routing import Routing


class RoutingStatistics(NamedTuple):
    """How a layer routed the tokens of one forward pass.

    A token counts unless token_mask excludes it. A slot counts in the shares if `selected` names an
    expert there. The load of an expert is its entry of `tokens_per_expert`, the router's choices;
    `kept_per_expert` has the result after capacity and assistance. Scalars are float64, except
    `dead_experts`, and 0 if nothing counts.
    """

    tokens_per_expert: Tensor
    """[E] int64: slots per expert as the router chose, before dropping and rerouting."""
    kept_per_expert: Tensor
    """[E] int64: slots per expert after dropping, rerouting and assistance."""
    dropped_share: Tensor
    """Share of the slots named in `selected` that name no expert in `indices`."""
    rerouted_share: Tensor
    """Share of the slots named in `selected` that name another expert in `indices`."""
    max_violation: Tensor
    """Largest load / mean load - 1: 0 when even, E - 1 with one expert in use.

    MaxVio of Wang et al., arXiv 2408.15664.
    """
    load_cv: Tensor
    """Standard deviation of the load (with divisor E, not E - 1) / mean load."""
    load_entropy: Tensor
    """Entropy of the experts' shares of the load, in nats: log E when even, 0 with one in use."""
    routing_entropy: Tensor
    """Mean over counted tokens of the entropy of softmax(logits), in nats."""
    dead_experts: Tensor
    """int64: how many experts have no load while others have some."""
    first_choice_weight: Tensor
    """Mean over counted tokens of weights[:, 0]."""
    logit_range: Tensor
    """Largest minus smallest logit of all counted tokens."""


#: The scalar fields, in order.
SCALARS = RoutingStatistics._fields[2:]


class Measurement(NamedTuple):
    """What is measured of the tokens of N forward passes: sums, minima and maxima."""

    tokens_per_expert: Tensor
    """[N, E] int64."""
    kept_per_expert: Tensor
    """[N, E] int64."""
    slots: Tensor
    """[N, 3] int64: slots named in `selected`, also in `indices`, there by another id."""
    means: Tensor
    """[N, 2]: minus routing_entropy, and first_choice_weight."""
    low: Tensor
    """[N]: the smallest logit; above `high` where no token counts."""
    high: Tensor
    """[N]: the largest logit."""


def routing_statistics(routing: Routing) -> RoutingStatistics:
    """How a layer routed, as tensors on its device, without a sync and without gradients.

    Args:
        routing: as `torchmoe.nn.MoE` returns it.

    Returns:
        The statistics; each is defined at its field.

    Raises:
        TypeError: routing is not a Routing.
    """
    if not isinstance(routing, Routing):
        raise TypeError(
            "routing_statistics: routing must be a Routing, such as moe(x).routing, "
            f"got {shown(routing)}"
        )
    return RoutingStatistics(*(value.squeeze(0) for value in complete(measure([routing]))))


@torch.no_grad()
def measure(routings: Sequence[Routing]) -> Measurement:
    """Reads the tokens of N passes that agree in shapes, dtypes, device and having a mask.

    All together, since between the large products of a step a call of torch costs more than what it
    does with the logits of one layer. The result shares no memory with the routings.
    """
    logits = torch.stack([routing.logits for routing in routings])  # [N, T, E]
    # Along the tokens, softmax over a few experts runs several times as fast.
    logits = logits.transpose(1, 2).contiguous()  # [N, E, T]
    masks = [routing.token_mask for routing in routings if routing.token_mask is not None]
    mask = torch.stack(masks) if masks else None  # [N, T]
    return Measurement(
        torch.stack([routing.tokens_per_expert for routing in routings]),
        torch.stack([routing.kept_per_expert for routing in routings]),
        _slot_counts(routings),
        _token_means(logits, torch.stack([routing.weights for routing in routings]), mask),
        *_logit_ends(logits, mask),
    )


@torch.no_grad()
def complete(measured: Measurement) -> RoutingStatistics:
    """The statistics of N passes, each field with N in front of its dimensions."""
    load = measured.tokens_per_expert.to(torch.float64)
    num_experts = load.shape[1]
    num_chosen = load.sum(1, keepdim=True)
    relative = load * num_experts / num_chosen.clamp(min=1)  # [N, E], 1 is the even share
    named, kept, rerouted = measured.slots.to(torch.float64).unbind(1)
    means = measured.means.to(torch.float64)
    return RoutingStatistics(
        tokens_per_expert=measured.tokens_per_expert,
        kept_per_expert=measured.kept_per_expert,
        dropped_share=(named - kept) / named.clamp(min=1),
        rerouted_share=rerouted / named.clamp(min=1),
        max_violation=(relative.amax(1) - 1).clamp(min=0),
        load_cv=relative.std(1, correction=0),
        load_entropy=torch.special.entr(relative / num_experts).sum(1),
        routing_entropy=means[:, 0].neg(),
        dead_experts=((load == 0) & (num_chosen > 0)).sum(1),
        first_choice_weight=means[:, 1],
        logit_range=(measured.high.to(torch.float64) - measured.low).clamp(min=0),
    )


def pack(statistics: RoutingStatistics) -> Tensor:
    """The statistics as one float64 tensor [..., 2 E + 9], to be added up over passes."""
    tokens, kept, *scalars = statistics
    return torch.cat([tokens, kept, torch.stack([s.double() for s in scalars], dim=-1)], dim=-1)


def unpack(sums: Tensor, forwards: int | Tensor) -> RoutingStatistics:
    """The statistics of several passes: counts are sums, all other values means.

    Args:
        sums: [..., 2 E + 9], the sum over the passes of what `pack` gives.
        forwards: how many passes, a number or [..., 1].

    Returns:
        The statistics; dead_experts is float64.
    """
    num_experts = (sums.shape[-1] - len(SCALARS)) // 2
    counts = sums[..., : 2 * num_experts].to(torch.int64)
    means = (sums[..., 2 * num_experts :] / forwards).unbind(-1)
    return RoutingStatistics(counts[..., :num_experts], counts[..., num_experts:], *means)


def _slot_counts(routings: Sequence[Routing]) -> Tensor:
    if all(routing.indices is routing.selected for routing in routings):
        # However many there are, none has moved.
        return routings[0].selected.new_zeros(len(routings), 3)
    selected = torch.stack([routing.selected for routing in routings])  # [N, T, K]
    indices = torch.stack([routing.indices for routing in routings])
    last = routings[0].logits.shape[1] - 1
    named = selected == selected.clamp(0, last)
    kept = (indices == indices.clamp(0, last)) & named
    rerouted = (indices != selected) & kept
    return torch.stack([named, kept, rerouted], dim=1).flatten(2).sum(2)


def _token_means(logits: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
    """From logits [N, E, T] and weights [N, T, K]."""
    log_probs = logits.log_softmax(1)
    # A logit of -inf has p log p = 0, which 0 * -inf is not.
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    negative_entropy = log_probs.exp_().mul_(finite).sum(1)  # [N, T]
    values = torch.stack([negative_entropy, weights.select(2, 0)], dim=2)  # [N, T, 2]
    return ops.mean_over_tokens(values, token_mask=mask)


def _logit_ends(logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """From logits [N, E, T]."""
    if logits.shape[2] == 0:
        none = logits.new_zeros(logits.shape[0])
        return none, none
    if mask is None:
        logits = logits.flatten(1)
        return logits.amin(1), logits.amax(1)
    masked = ~mask
    low = logits.amin(1).masked_fill_(masked, torch.inf)  # [N, T]
    high = logits.amax(1).masked_fill_(masked, -torch.inf)
    return low.amin(1), high.amax(1)
