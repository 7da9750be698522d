"""Group-limited selection: a token's experts come from its best groups."""

from __future__ import annotations

import torch
from torch import Tensor

from torchmoe import ops
from torchmoe._by_expert import named

_BEST_OF_GROUP = 2  # how many experts' scores make up a group's


def limit_to_groups(scores: Tensor, logits: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """The scores with -inf for experts outside a token's best groups (arXiv 2412.19437).

    A group's score is the sum of the scores of its two best experts (of one if it has no more).
    Ties go to the group whose best two have the larger sum of exp(logit), to which scores that have
    underflowed are proportional, then to the lower group. With a mask of 0 instead of -inf an
    expert outside the groups could win over negative scores.

    Args:
        scores: [T, E].
        logits: [T, E]; they decide between equal scores.
        num_groups: groups of E / num_groups neighbouring experts.
        top_groups: how many groups a token keeps.

    Returns:
        [T, E].
    """
    num_tokens, num_experts = scores.shape
    size = num_experts // num_groups
    shape = (num_tokens * num_groups, size)  # a row for each group of each token
    of_group, logits_of_group = scores.reshape(shape), logits.reshape(shape)
    best = ops.select_experts(of_group, min(_BEST_OF_GROUP, size), tie_break=logits_of_group)
    groups = ops.select_experts(
        of_group.gather(1, best).sum(dim=1).view(num_tokens, num_groups),
        top_groups,
        tie_break=logits_of_group.gather(1, best).logsumexp(dim=1).view(num_tokens, num_groups),
    )  # [T, top_groups]
    kept = named(groups, num_groups).unsqueeze(-1).expand(num_tokens, num_groups, size)
    return scores.masked_fill(~kept.reshape(scores.shape), -torch.inf)
