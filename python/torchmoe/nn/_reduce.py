"""Sums of counts and statistics over the micro-batches of a step and the processes of a group."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Statistics = TypeVar("Statistics")


class SharedGroup:
    """Holds a process group that copies of a module share, since it cannot be copied.

    A pickled copy loses it and raises when it is asked for the group: None instead would mean all
    processes.

    Args:
        group: None is all processes.
        lost: the ranks of the group that was pickled; none where it had been destroyed.
    """

    def __init__(self, group: ProcessGroup | None, lost: tuple[int, ...] | None = None) -> None:
        self._group = group
        self._lost = lost

    @property
    def group(self) -> ProcessGroup | None:
        """The group; raises RuntimeError where it was lost."""
        if self._lost is not None:
            raise RuntimeError(
                "MoE: process_group must be set on a layer that was pickled with one, got none in "
                f"place of the group of ranks {list(self._lost) or 'unknown'}"
            )
        return self._group

    def __deepcopy__(self, memo: dict[int, object]) -> SharedGroup:
        return self

    def __reduce__(self) -> tuple[type[SharedGroup], tuple[None, tuple[int, ...] | None]]:
        lost = self._lost
        if self._group is not None:
            try:
                lost = tuple(dist.get_process_group_ranks(self._group))
            except KeyError:  # by which torch means that it was destroyed
                lost = ()
        return SharedGroup, (None, lost)


def total(parts: Sequence[Statistics], group: ProcessGroup | None) -> Statistics:
    """The sum of several trees of tensors, leaf by leaf.

    Over `parts` and over the processes of `group`. None stays None. The result shares no memory
    with the parts and carries no gradient.
    """

    def total_leaf(*leaves: Tensor | None) -> Tensor | None:
        given = [leaf.detach() for leaf in leaves if leaf is not None]
        if not given:
            return None
        if len(given) < len(leaves):
            # Were it skipped, the processes would wait for each other in the reduction.
            raise ValueError(
                "MoE: routing must hold the estimator's statistics in all micro-batches or none, "
                f"got them in {len(given)} of {len(leaves)}"
            )
        value = reduce(add, given).clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(value, group=group)
        return value

    result: Statistics = pytree.tree_map(total_leaf, parts[0], *parts[1:])
    return result


def counts_and_part(
    counts: Tensor, num_tokens: int | Tensor, group: ProcessGroup | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Counts of all processes, and this process's part in a mean over all tokens.

    With n_r tokens here, n in all and W processes the part is n_r W / n: the average over the
    processes of part * mean over the process's own tokens is the mean over all tokens, however
    unequal the n_r are. It is exactly 1 where they are equal, and 0 without a token.

    Args:
        counts: integers [E] of this process.
        num_tokens: n_r.
        group: the processes; None is all.
        dtype: of the part.

    Returns:
        Counts [E], and the part: a scalar, without gradient.
    """
    tokens = counts.new_ones(1) * num_tokens
    mine = torch.cat([counts, tokens, torch.ones_like(tokens)])
    # One reduction: whatever is reduced apart is waited for apart.
    summed = total([mine], group)
    in_all, processes = summed[-2], summed[-1]
    part = (tokens[0] * processes).to(dtype) / in_all.clamp(min=1).to(dtype)
    return summed[:-2], part
