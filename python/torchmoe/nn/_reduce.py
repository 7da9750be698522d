"""Sums of counts and statistics over the micro-batches of a step and the processes of a group."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Statistics = TypeVar("Statistics")


def total(parts: Sequence[Statistics], group: ProcessGroup | None) -> Statistics:
    """The sum of several trees of tensors, leaf by leaf.

    Over `parts` and over the processes of `group`. None stays None. The result shares no memory
    with the parts and carries no gradient.
    """

    def total_leaf(*leaves: Tensor | None) -> Tensor | None:
        first = leaves[0]
        if not isinstance(first, Tensor):
            return first
        value: Tensor = reduce(add, (leaf.detach() for leaf in leaves if leaf is not None)).clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(value, group=group)
        return value

    result: Statistics = pytree.tree_map(total_leaf, parts[0], *parts[1:])
    return result
