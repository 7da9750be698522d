"""Means over seeds and how far to trust them.

Shapes: S seeds, N points of a curve.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit  # scipy.stats has it too, and takes a second to import

from training.figures import Values


class Interval(NamedTuple):
    """A mean and its confidence interval, whose ends are NaN where there is none."""

    mean: Values
    low: Values
    high: Values


def t_interval(values: Values, confidence: float) -> Interval:
    """The mean over seeds [S, ...] and Student's two-sided interval, each [...].

    One seed says nothing about how seeds differ: it has no interval.
    """
    seeds = len(values)
    mean = np.asarray(np.mean(values, axis=0))
    if seeds == 1:
        none = np.full_like(mean, math.nan)
        return Interval(mean, none, none)
    quantile = stdtrit(seeds - 1, (1 + confidence) / 2)  # of Student's t
    reach = quantile * np.std(values, axis=0, ddof=1) / math.sqrt(seeds)
    return Interval(mean, mean - reach, mean + reach)


def each_confidence(together: float, intervals: int) -> float:
    """What each interval needs so that all hold at once with that confidence (Bonferroni)."""
    return 1 - (1 - together) / intervals


# ---- as text and as JSON


def digits(value: Values | np.floating[Any], sign: str = "") -> str:
    """A loss or a difference of two."""
    return "n/a" if np.isnan(value) else f"{value:{sign}.4f}"


def ends(interval: Interval, sign: str = "") -> str:
    """Those of an interval, where there is one."""
    if np.isnan(interval.low):
        return "n/a"
    return f"{digits(interval.low, sign)} to {digits(interval.high, sign)}"


def listed(values: Values) -> list[float | None]:
    """Numbers ready for JSON, which has no NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def to_dict(interval: Interval | None) -> dict[str, float | None] | None:
    """An interval ready for JSON."""
    return interval and dict(zip(interval._fields, listed(np.array(interval)), strict=True))
