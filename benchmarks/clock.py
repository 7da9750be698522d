"""Times on a machine whose speed changes from minute to minute.

What is to be compared forms a block: every round runs each of its members once, in an order that
turns by one, and the machine's peaks are probed before and after. Only ratios within a block are
worth quoting. A block that saw the machine throttled, by a probe below 85 % of the best so far, is
measured again. What the best of the whole run shows only in the end, `Clock.warning` says.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.peaks import FMA, Found, Peaks

Run = Callable[[], float]  # does the work once and says how many seconds it took

THROTTLED = 0.85
FLATTERED = 0.95  # of the best: below it, a block's shares of its own peak are too high to quote
REPEATS = 3  # of a throttled block
PAUSE, PATIENCE = 0.5, 8  # seconds for whatever throttles to pass, and how often
LONGEST, FEWEST = 7.0, 3  # seconds after which a slow member sits out, and its rounds by then
SHORTEST, MOST = 0.5, 200  # seconds up to which quick members get further rounds, and how many


@dataclass(frozen=True)
class Times:
    """Seconds of one member, round by round."""

    seconds: list[float]

    @property
    def low(self) -> float:
        """The fastest round."""
        return min(self.seconds)

    @property
    def middle(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The ninth decile over the minimum: 1 on a machine that nothing disturbs."""
        ordered = sorted(self.seconds)
        return ordered[math.ceil(0.9 * len(ordered)) - 1] / ordered[0]


@dataclass(frozen=True)
class Block:
    """What was measured side by side."""

    name: str
    times: dict[str, Times]
    before: Found  # the probes
    after: Found
    repeats: int
    throttled: bool  # even the last time

    def peak(self, name: str = FMA) -> float:
        """FLOP/s of the better probe, so that a share of it is not flattered."""
        return 1e9 * max(self.before[name], self.after[name])

    def lowest(self, best: Found) -> float:
        """The lowest of its probes over the best of that kind."""
        return lowest_share((self.before, self.after), best)

    def flattery(self, best: Found) -> float:
        """How many times too high a share of its own peak is, at most."""
        return max(1e9 * best[name] / self.peak(name) for name in self.before)

    def ratio(self, name: str, base: str) -> float:
        """One member's fastest round over another's."""
        return self.times[name].low / self.times[base].low

    def __str__(self) -> str:
        """The probes, and what became of them."""
        text = "; ".join(
            f"{name} peak {before:.0f} before, {self.after[name]:.0f} GFLOP/s after"
            for name, before in self.before.items()
        )
        if self.repeats:
            text += f", repetition {self.repeats}"
        return text + (", throttled" if self.throttled else "")


class Clock:
    """Measures blocks and remembers the best probes of them all."""

    def __init__(self, rounds: int, peaks: Peaks, repeats: int = REPEATS) -> None:
        """Takes how often each member of a block runs, and a throttled block is repeated."""
        self.rounds = rounds
        self.peaks = peaks
        self._most_repeats = repeats
        self.blocks: list[Block] = []
        self._best = peaks.undisturbed()

    def measure(self, name: str, runs: Mapping[str, Run]) -> Block:
        """Times the members of a block, again where the machine was throttled."""
        seconds = sum(run() for run in runs.values())
        if seconds < SHORTEST:  # what a first call sets up would hide how quick the others are
            seconds = sum(run() for run in runs.values())
        rounds = max(self.rounds, min(MOST, int(SHORTEST / seconds)))
        before = self._look_when_quiet()
        for repeats in range(self._most_repeats + 1):
            times = interleave(runs, rounds)
            after = self._look()
            block = Block(name, times, before, after, repeats, self._is_throttled(before, after))
            if not block.throttled:
                break
            if repeats < self._most_repeats:
                print(f"clock: to be repeated: {block}", file=sys.stderr, flush=True)
                before = self._look_when_quiet()
        self.blocks.append(block)
        return block

    def warning(self) -> str | None:
        """One line on the blocks that the best probes show to be slower, if there are any."""
        return warning_of(self.blocks, self._best)

    def _look_when_quiet(self) -> Found:
        """Probes until the machine is not throttled, or patience ends."""
        for _ in range(PATIENCE):
            if not self._is_throttled(found := self._look()):
                break
            time.sleep(PAUSE)
        return found

    def _look(self) -> Found:
        """Probes."""
        found = self.peaks()
        for name, rate in found.items():
            self._best[name] = max(self._best[name], rate)
        return found

    def _is_throttled(self, *looks: Found) -> bool:
        """Whether a probe lies below the best so far."""
        return lowest_share(looks, self._best) < THROTTLED


def lowest_share(looks: Sequence[Found], best: Found) -> float:
    """The lowest of all probes, each over the best of its kind."""
    return min(rate / best[name] for look in looks for name, rate in look.items())


def warning_of(blocks: Sequence[Block], best: Found) -> str | None:
    """What the best probes of a run say of its blocks: which saw the peak fall, and by how much.

    A block may lie below without being throttled when it was measured: the best came later.
    """
    fallen = [
        f"{block.name} (down to {block.lowest(best):.0%}, shares up to "
        f"{block.flattery(best) - 1:.0%} too high)"
        for block in blocks
        if block.lowest(best) < THROTTLED or block.flattery(best) > 1 / FLATTERED
    ]
    if not fallen:
        return None
    tops = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in best.items())
    return (
        f"warning: the peak fell in {len(fallen)} of {len(blocks)} blocks below the best of the "
        f"run ({tops}): {'; '.join(fallen)}"
    )


def interleave(runs: Mapping[str, Run], rounds: int) -> dict[str, Times]:
    """Every member in every round, except for those that take too long."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if turn < FEWEST or sum(seconds[name]) < LONGEST:
                seconds[name].append(runs[name]())
    return {name: Times(found) for name, found in seconds.items()}


def timed(call: Callable[[], object]) -> Run:
    """A member that calls and drops the result after the clock has stopped."""

    def run() -> float:
        begin = time.perf_counter()
        result = call()
        end = time.perf_counter()
        del result
        return end - begin

    return run
