"""Which expert leaves memory when another needs its place.

A policy is told of every call, forward or backward, and gives each expert a worth. The resident
that is worth least is evicted; of equals the one whose last call is longest ago, then the lower id.
`POLICIES` is the one table of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

#: The experts that each coming call needs, in the order of the calls.
Trace = Sequence[Iterable[int] | Tensor]

# Weight of the past in the running average, as in the routers' `usage`.
_DECAY = 0.99
_SMALLEST = 1e-100  # of the factor that the averages have in common


class Policy:
    """Base of the policies; by itself it knows when each expert was needed last.

    Args:
        num_experts: E.
        trace: what the coming calls need, for a policy that looks ahead.
    """

    looks_ahead = False

    def __init__(self, num_experts: int, trace: Trace | None = None) -> None:
        del trace  # for subclasses
        self._calls = 0
        self._last = [0] * num_experts

    def called(self, slots: Mapping[int, int]) -> None:
        """Takes note of a call, before anything is evicted for it.

        Args:
            slots: how many slots of the call each expert has that it needs.
        """
        self._calls += 1
        for expert in slots:
            self._last[expert] = self._calls

    def warm(self, usage: Sequence[float]) -> None:
        """Takes each expert's share of the slots from elsewhere; for policies that keep one."""

    def worth(self, expert: int) -> float:
        """The larger, the better to have it in memory."""
        raise NotImplementedError

    def ranked(self, experts: Iterable[int]) -> list[int]:
        """The experts, the first to evict first."""
        return sorted(experts, key=self._rank)

    def victim(self, experts: Iterable[int]) -> int | None:
        """The first of `ranked`; None if there are none."""
        return min(experts, key=self._rank, default=None)

    def _rank(self, expert: int) -> tuple[float, int, int]:
        return self.worth(expert), self._last[expert], expert


class _Usage(Policy):
    """Keeps those with the largest running average of their share of a call's slots."""

    def __init__(self, num_experts: int, trace: Trace | None = None) -> None:
        super().__init__(num_experts, trace)
        # The average is factor * value: the past decays without touching every expert's value.
        self._factor = 1.0
        self._values = [1.0 / num_experts] * num_experts

    def called(self, slots: Mapping[int, int]) -> None:
        super().called(slots)
        total = sum(slots.values())
        if total == 0:
            return
        self._factor *= _DECAY
        for expert, count in slots.items():
            self._values[expert] += (1 - _DECAY) * count / total / self._factor
        if self._factor < _SMALLEST:
            self.warm([self._factor * value for value in self._values])

    def warm(self, usage: Sequence[float]) -> None:
        self._factor, self._values = 1.0, list(usage)

    def worth(self, expert: int) -> float:
        return self._values[expert]


class _LeastRecentlyUsed(Policy):
    """Keeps those that were needed last."""

    def worth(self, expert: int) -> float:
        return self._last[expert]


class _LeastFrequentlyUsed(Policy):
    """Keeps those that the most calls have needed."""

    def __init__(self, num_experts: int, trace: Trace | None = None) -> None:
        super().__init__(num_experts, trace)
        self._counts = [0] * num_experts

    def called(self, slots: Mapping[int, int]) -> None:
        super().called(slots)
        for expert in slots:
            self._counts[expert] += 1

    def worth(self, expert: int) -> float:
        return self._counts[expert]


class _Oracle(Policy):
    """Keeps those that are needed next (Belady, IBM Systems Journal 5, 1966).

    No policy that loads on demand loads less; it shows how much the others leave.
    """

    looks_ahead = True

    def __init__(self, num_experts: int, trace: Trace | None = None) -> None:
        super().__init__(num_experts, trace)
        self._trace = [_ids(step, num_experts, call) for call, step in enumerate(trace or ())]
        self._uses: list[list[int]] = [[] for _ in range(num_experts)]  # calls, ascending
        for call, ids in enumerate(self._trace):
            for expert in sorted(ids):
                self._uses[expert].append(call)

    def called(self, slots: Mapping[int, int]) -> None:
        given = self._trace[self._calls] if self._calls < len(self._trace) else None
        if given != set(slots):
            told = "no such call" if given is None else sorted(given)
            raise ValueError(
                f"offload: trace must hold the experts that each call needs, {sorted(slots)} in "
                f"call {self._calls}, got {told}"
            )
        super().called(slots)

    def worth(self, expert: int) -> float:
        uses = self._uses[expert]
        following = bisect_left(uses, self._calls)
        return -uses[following] if following < len(uses) else -float("inf")


def _ids(step: Iterable[int] | Tensor, num_experts: int, call: int) -> set[int]:
    """The experts of one call of a trace."""
    ids = set(step.flatten().tolist() if isinstance(step, Tensor) else step)
    wrong = [expert for expert in ids if not isinstance(expert, int) or isinstance(expert, bool)]
    if wrong:
        raise TypeError(f"offload: trace must hold ids, got {wrong[0]!r} in call {call}")
    outside = sorted(expert for expert in ids if not 0 <= expert < num_experts)
    if outside:
        raise ValueError(
            f"offload: trace must hold ids in [0, {num_experts}), got {outside[0]} in call {call}"
        )
    return ids


#: Every policy by its name.
POLICIES: dict[str, type[Policy]] = {
    "usage": _Usage,
    "lru": _LeastRecentlyUsed,
    "lfu": _LeastFrequentlyUsed,
    "oracle": _Oracle,
}
