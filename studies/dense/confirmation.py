"""What the chosen models of both sides reach on one text, and how far they are apart.

S is the number of seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from studies.common.intervals import Interval, t_interval
from studies.common.outcome import Outcome
from studies.dense.flip import flip_ratio, mean_ratio
from training.figures import Values

CONFIDENCE = 0.95
MIXTURE, DENSE = "mixture", "dense"
SIDES = (MIXTURE, DENSE)


@dataclass(frozen=True)
class Confirmed:
    """Both sides on one text; a difference is the mixture's loss less the dense model's."""

    runs: Mapping[str, Mapping[int, Sequence[Outcome]]]
    """[S], by side and by the steps of the run."""

    @property
    def seeds(self) -> int:
        """How many there are."""
        return len(self.runs[MIXTURE][self.own(MIXTURE)])

    def own(self, side: str) -> int:
        """The steps of a side in the time that both are given."""
        return max(self.runs[side])

    @property
    def shared(self) -> list[int]:
        """The steps that both sides were trained for: they read the same bytes."""
        return sorted({*self.runs[MIXTURE]} & {*self.runs[DENSE]})

    def losses(self, side: str, steps: int) -> Values:
        """[S], bits per byte of held-out text at the end of runs of so many steps."""
        return np.array([one.held_out for one in self.runs[side][steps]])

    def at_equal_time(self) -> Interval:
        """The difference where each side takes the steps that fit into the time."""
        own = (self.losses(side, self.own(side)) for side in SIDES)
        return difference(*own)

    def at_equal_bytes(self, steps: int) -> Interval:
        """The difference where both take so many steps."""
        return difference(*(self.losses(side, steps) for side in SIDES))

    def flips(self) -> list[float]:
        """[S], the ratio of step times at which the difference is 0, NaN where out of reach."""
        return [
            flip_ratio(
                *(
                    {steps: runs[seed].held_out for steps, runs in self.runs[side].items()}
                    for side in SIDES
                )
            )
            for seed in range(self.seeds)
        ]

    def flip(self) -> Interval:
        """The mean of the seeds' ratios."""
        return mean_ratio(self.flips(), CONFIDENCE)


def difference(mixture: Values, dense: Values) -> Interval:
    """How far the mixture's losses [S] are above the dense model's, seed by seed."""
    return t_interval(mixture - dense, CONFIDENCE)
