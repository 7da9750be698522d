"""The choice of each side's model and learning rate, by the training loss.

Both sides are searched alike, and neither by held-out text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from studies.common.outcome import Outcome
from studies.dense.candidates import Side
from training.settings import Settings

MIDDLE_RATE = 3e-3
RATE_FACTOR = 2.0  # from one learning rate to the next
MOST_RATES = 6
TUNED_PART = 4  # learning rates are tried on that part of the steps

#: Trains runs to their end; an outcome for each, in their order.
Train = Callable[[Sequence[Settings]], list[Outcome]]
Rates = dict[float, Outcome]


@dataclass(frozen=True)
class Tried:
    """A candidate and what was found of it."""

    rates: dict[float, float]
    """Training loss on a part of the steps, by learning rate."""
    outcome: Outcome
    """Of all its steps with the best of these rates."""

    @property
    def rate(self) -> float:
        """The best of these rates."""
        return self.outcome.settings.lr


@dataclass(frozen=True)
class Choice:
    """What one side takes into the comparison."""

    name: str
    settings: Settings
    """With its learning rate and its steps."""
    rates: dict[float, float]
    """Training loss on all of its steps, by learning rate."""


def search(
    sides: Mapping[str, Side], steps: Mapping[str, int], train: Train
) -> tuple[dict[str, Tried], dict[str, Choice]]:
    """What was tried, by candidate, and what was chosen, by side.

    Args:
        sides: what there is to choose from.
        steps: of each candidate in the time that all are given.
        train: trains.
    """
    best: dict[str, str] = {}
    tried: dict[str, Tried] = {}
    for around in (False, True):
        candidates = {
            name: replace(some, steps=steps[name])
            for side, one in sides.items()
            for name, some in (one.around[best[side]] if around else one.first).items()
        }
        tried |= try_out(candidates, train)
        best = {side: least(tried, one.all) for side, one in sides.items()}
    chosen = {
        side: replace(one.all[best[side]], steps=steps[best[side]], lr=tried[best[side]].rate)
        for side, one in sides.items()
    }
    found = tune(chosen, train)
    return tried, {
        side: Choice(best[side], replace(chosen[side], lr=best_rate(rates)), losses(rates))
        for side, rates in found.items()
    }


def least(tried: Mapping[str, Tried], names: Iterable[str]) -> str:
    """The candidate with the least training loss among those names that were tried."""
    return min(
        (name for name in names if name in tried), key=lambda name: tried[name].outcome.tuning_loss
    )


def try_out(candidates: Mapping[str, Settings], train: Train) -> dict[str, Tried]:
    """Each candidate's learning rates on a part of the steps, and the best one on all of them."""
    short = {
        name: replace(some, lr=MIDDLE_RATE, steps=max(1, (some.steps or 0) // TUNED_PART))
        for name, some in candidates.items()
    }
    found = tune(short, train)
    whole = train([replace(candidates[name], lr=best_rate(found[name])) for name in candidates])
    return {
        name: Tried(losses(found[name]), outcome)
        for name, outcome in zip(candidates, whole, strict=True)
    }


def tune(candidates: Mapping[str, Settings], train: Train) -> dict[str, Rates]:
    """Each candidate with its learning rate and those around it, until the best one is inside."""
    found: dict[str, Rates] = {name: {} for name in candidates}
    wanted = {
        name: [some.lr / RATE_FACTOR, some.lr, some.lr * RATE_FACTOR]
        for name, some in candidates.items()
    }
    while wanted:
        runs = [(name, rate) for name, rates in wanted.items() for rate in rates]
        outcomes = train([replace(candidates[name], lr=rate) for name, rate in runs])
        for (name, rate), outcome in zip(runs, outcomes, strict=True):
            found[name][rate] = outcome
        following = {name: next_rate(losses(rates)) for name, rates in found.items()}
        wanted = {name: [rate] for name, rate in following.items() if rate is not None}
    return found


def next_rate(tried: Mapping[float, float]) -> float | None:
    """The next learning rate where the best one is at an end of those tried, by their losses."""
    best = min(tried, key=lambda rate: tried[rate])
    if len(tried) >= MOST_RATES or min(tried) < best < max(tried):
        return None
    return best / RATE_FACTOR if best == min(tried) else best * RATE_FACTOR


def best_rate(rates: Rates) -> float:
    """The one with the least training loss."""
    return min(rates, key=lambda rate: rates[rate].tuning_loss)


def losses(rates: Rates) -> dict[float, float]:
    """The training losses."""
    return {rate: outcome.tuning_loss for rate, outcome in sorted(rates.items())}
