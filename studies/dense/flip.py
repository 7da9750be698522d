"""How much longer a step of the mixture may take before the dense model is better.

L is the number of lengths that a model was trained for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from studies.common.intervals import Interval, t_interval

SHORTER = (4, 2, 1)  # parts of the steps that both sides are trained for


def lengths(steps: Mapping[str, int]) -> dict[str, list[int]]:
    """The steps that each side is trained for: parts of the fewer steps, and all of its own.

    Args:
        steps: of each side in the time that both are given.
    """
    both = {max(1, min(steps.values()) // part) for part in SHORTER}
    return {side: sorted(both | {own}) for side, own in steps.items()}


def flip_ratio(mixture: Mapping[int, float], dense: Mapping[int, float]) -> float:
    """The ratio of step times at which both reach the same loss in the same time.

    The loss is the least that both reach in the time they are given: the higher of those at the
    ends. The ratio is that of the steps that they need for it: were a step of the mixture longer
    by that factor, both would need the same time.

    Args:
        mixture: losses at the end of runs of different length, by their steps.
        dense: the same.

    Returns:
        The ratio, NaN where one of them is better in its shortest run than the other in its
        longest.
    """
    loss = max(curve[max(curve)] for curve in (mixture, dense))
    return steps_to(loss, dense) / steps_to(loss, mixture)


def steps_to(loss: float, curve: Mapping[int, float]) -> float:
    """The steps to a loss, on straight lines over the logarithm of the steps; NaN if outside.

    Where noise makes the curve pass the loss more than once, the last time counts.
    """
    ends = sorted(curve.items())
    if loss == ends[-1][1]:
        return ends[-1][0]
    for (before, high), (after, low) in reversed([*pairwise(ends)]):
        if low <= loss <= high:
            part = (high - loss) / (high - low) if high > low else 1.0
            return math.exp((1 - part) * math.log(before) + part * math.log(after))
    return math.nan


def mean_ratio(ratios: list[float], confidence: float) -> Interval:
    """The geometric mean of the seeds' ratios [S] and its interval, NaN where a seed's is NaN."""
    logarithms = t_interval(np.log(np.array(ratios)), confidence)
    return Interval(*(np.exp(value) for value in logarithms))
