"""Group-limited selection: a token's experts come from its best groups."""

from __future__ import annotations

import torch
from torch import Tensor

from torchmoe import ops
from torchmoe._slots import named

_BEST_OF_GROUP = 2  # how many experts' scores make up a group's


def limit_to_groups(scores: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """The scores with -inf for experts outside a token's best groups (arXiv 2412.19437).

    A group's score is the sum of its two best experts' (of one where it has no more); ties go to
    the lower group. A mask of 0 instead of -inf would let an expert outside the groups win over
    negative scores.

    Args:
        scores: [T, E].
        num_groups: groups of E / num_groups neighbouring experts.
        top_groups: how many groups a token keeps.

    Returns:
        [T, E].
    """
    num_tokens, num_experts = scores.shape
    size = num_experts // num_groups
    by_group = scores.view(num_tokens, num_groups, size)
    best = by_group.topk(min(_BEST_OF_GROUP, size), dim=-1).values  # [T, G, 2]
    groups = ops.select_experts(best.sum(dim=-1), top_groups)  # [T, top_groups]
    kept = named(groups, num_groups).unsqueeze(-1).expand(by_group.shape)  # [T, G, E / G]
    return scores.masked_fill(~kept.reshape(scores.shape), -torch.inf)
