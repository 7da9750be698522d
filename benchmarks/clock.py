"""Times on a machine whose speed changes from minute to minute.

What is to be compared forms a block: every round runs each of its members once, in an order that
turns by one, and the FMA peak is probed before and after. Only ratios within a block are worth
quoting. A block that saw the machine throttled, by a probe below 85 % of the best of the whole run,
is measured again.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.fma_peak import FmaPeak

Run = Callable[[], float]  # does the work once and says how many seconds it took

THROTTLED = 0.85
REPEATS = 3  # of a throttled block
PAUSE, PATIENCE = 0.5, 8  # seconds for whatever throttles to pass, and how often
LONGEST, FEWEST = 10.0, 3  # seconds after which a slow member sits out, and its rounds by then
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

    times: dict[str, Times]
    before: float  # the probes, GFLOP/s
    after: float
    repeats: int
    throttled: bool  # even the last time

    @property
    def peak(self) -> float:
        """FLOP/s of the better probe, so that a share of it is not flattered."""
        return 1e9 * max(self.before, self.after)

    def ratio(self, name: str, base: str) -> float:
        """One member's fastest round over another's."""
        return self.times[name].low / self.times[base].low

    def __str__(self) -> str:
        """The probes, and what became of them."""
        text = f"FMA peak {self.before:.0f} before, {self.after:.0f} GFLOP/s after"
        if self.repeats:
            text += f", repetition {self.repeats}"
        return text + (", throttled" if self.throttled else "")


class Clock:
    """Measures blocks and remembers the best probe of them all."""

    def __init__(self, rounds: int, repeats: int = REPEATS) -> None:
        """Takes how often each member of a block runs, and a throttled block is repeated."""
        self.rounds = rounds
        self.probe = FmaPeak()
        self._most_repeats = repeats
        self.blocks: list[Block] = []
        self._best = self.probe.undisturbed()

    def measure(self, runs: Mapping[str, Run]) -> Block:
        """Times the members, again where the machine was throttled."""
        seconds = sum(run() for run in runs.values())
        if seconds < SHORTEST:  # what a first call sets up would hide how quick the others are
            seconds = sum(run() for run in runs.values())
        rounds = max(self.rounds, min(MOST, int(SHORTEST / seconds)))
        before = self._look_when_quiet()
        for repeats in range(self._most_repeats + 1):
            times = interleave(runs, rounds)
            after = self._look()
            throttled = min(before, after) < THROTTLED * self._best
            block = Block(times, before, after, repeats, throttled)
            if not throttled:
                break
            if repeats < self._most_repeats:
                print(f"clock: to be repeated: {block}", file=sys.stderr, flush=True)
                before = self._look_when_quiet()
        self.blocks.append(block)
        return block

    def _look_when_quiet(self) -> float:
        """Probes until the machine is not throttled, or patience ends."""
        for _ in range(PATIENCE):
            if (found := self._look()) >= THROTTLED * self._best:
                break
            time.sleep(PAUSE)
        return found

    def _look(self) -> float:
        """Probes."""
        found = self.probe()
        self._best = max(self._best, found)
        return found


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
