"""The figures of comparisons: losses of several kinds of training, and their differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from studies.common.intervals import Interval
from training.figures import (
    GREY,
    WIDTH,
    Values,
    add_legend,
    line_look,
    new_figure,
    set_loss_axes,
)

COMPARED_BITS = 1.5  # shown above the worst end of a comparison, whose differences are small


class Curve(NamedTuple):
    """A mean over seeds with its confidence interval, along x [N]."""

    x: Values
    y: Interval


class Comparison(NamedTuple):
    """Curves of several kinds of training by name, and how far they are from one of them."""

    loss: dict[str, Curve]
    difference: dict[str, Curve]


def study(by_steps: Comparison, by_seconds: Comparison, yardstick: str, about: str) -> Figure:
    """Validation loss by steps and by time, above what each kind differs from the yardstick.

    Args:
        by_steps: x in optimizer steps.
        by_seconds: x in seconds.
        yardstick: name of the kind that the differences are to.
        about: what lines and bands are, to stand in the legend.
    """
    figure = new_figure(WIDTH, 7.2)
    grid = figure.subplots(2, 2, sharex="col", height_ratios=(1, 1.2))
    looks = {name: line_look(index) for index, name in enumerate(by_steps.loss)}
    losses = shown_losses([*by_steps.loss.values(), *by_seconds.loss.values()])
    for (above, below), compared in zip(grid.T, (by_steps, by_seconds), strict=True):
        for axes, curves in ((above, compared.loss), (below, compared.difference)):
            for name, curve in curves.items():
                draw_curve(axes, curve, looks[name])
            set_loss_axes(axes)
        above.set_ylim(losses)
        below.axhline(0, color=GREY, linewidth=1, zorder=1.5)
        below.set_ylim(shown_differences(compared.difference.values()))
    grid[0, 0].set_ylabel("validation loss (bits per byte)")
    grid[1, 0].set_ylabel(f"difference to {yardstick} (bits per byte)\nbelow 0: better")
    grid[1, 0].set_xlabel("optimizer steps")
    grid[1, 1].set_xlabel("training time (seconds)")
    handles = [Line2D([], [], label=name, **look) for name, look in looks.items()]
    add_legend(figure, handles, about, columns=3)
    return figure


def draw_curve(axes: Axes, curve: Curve, look: Mapping[str, Any]) -> None:
    """A line and its band, which has edges since several lie on each other."""
    single = "." if len(curve.x) == 1 else ""  # one point alone makes no line
    axes.plot(curve.x, curve.y.mean, marker=single, **look)
    for end in (curve.y.low, curve.y.high):
        axes.plot(curve.x, end, color=look["color"], linewidth=0.5, alpha=0.6)
    axes.fill_between(
        curve.x, curve.y.low, curve.y.high, color=look["color"], alpha=0.08, linewidth=0
    )


def shown_losses(curves: Sequence[Curve]) -> tuple[float, float]:
    """The ends of a loss axis on which the end can be read rather than the start."""
    lowest = min(np.nanmin([curve.y.mean, curve.y.low]) for curve in curves)
    last = max(curve.y.mean[-1] for curve in curves)
    return lowest - 0.05, last + COMPARED_BITS


def shown_differences(curves: Iterable[Curve]) -> tuple[float, float]:
    """The ends of an axis that holds 0 and the later half of each curve with its band."""
    shown = [0.0]
    for curve in curves:
        late = curve.x >= curve.x[-1] / 2
        shown += [value for line in curve.y for value in line[late] if math.isfinite(value)]
    margin = 0.08 * (max(shown) - min(shown)) or COMPARED_BITS
    return min(shown) - margin, max(shown) + margin
