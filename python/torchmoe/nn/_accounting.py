"""The fifth step of `MoE.forward`: counts and losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from torchmoe._by_expert import count
from torchmoe.losses import LossInputs
from torchmoe.nn.balance import Load
from torchmoe.nn.routers._usage import usage_of

if TYPE_CHECKING:
    from torchmoe.nn._decision import Choice
    from torchmoe.nn.moe import MoE
    from torchmoe.nn.routers.context_router import RouterOutput


class Account(NamedTuple):
    """The counts and losses of a forward pass."""

    tokens_per_expert: Tensor
    """[E] int64: the router's own choices."""
    kept_per_expert: Tensor
    """[E] int64: as routed."""
    aux_loss: Tensor
    """The weighted sum of the losses."""
    losses: dict[str, Tensor]
    """The terms by name, unweighted."""


def account(
    layer: MoE,
    routed: RouterOutput,
    choice: Choice,
    weights: Tensor,
    token_mask: Tensor | None,
    num_tokens: int | Tensor,
    leading: torch.Size,
    earlier_counts: Tensor | None,
    has_logits: bool,
) -> Account:
    """Counts the slots and forms the losses, which without logits are unknown and weigh nothing."""
    tokens_per_expert = count(choice.chosen.flatten(), layer.num_experts)
    kept_per_expert = tokens_per_expert
    if not choice.is_kept:
        kept_per_expert = count(choice.indices.flatten(), layer.num_experts)
    if not has_logits:
        aux_loss, losses = layer.balance.unknown(routed.logits)
        return Account(tokens_per_expert, kept_per_expert, aux_loss, losses)
    clean_logits = routed.logits if routed.clean_logits is None else routed.clean_logits
    aux_loss, losses = layer.balance.account(
        LossInputs(
            logits=routed.logits,
            weights=weights,
            indices=choice.weighed,
            token_mask=token_mask,
            score_function=layer.estimator.score_function,
            num_experts=layer.num_experts,
            top_k=layer.top_k,
            clean_logits=clean_logits,
            noise_deviation=routed.noise_deviation,
        ),
        Load(
            chosen=choice.chosen,
            tokens_per_expert=tokens_per_expert,
            num_tokens=num_tokens,
            leading=leading,
            training=layer.training,
            earlier_counts=earlier_counts,
            usage=usage_of(layer.router),
        ),
        layer._process_group,
    )
    return Account(tokens_per_expert, kept_per_expert, aux_loss, losses)
