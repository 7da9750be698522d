"""The figure: training loss over time, and the loss at the end of runs of several lengths."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, ScalarFormatter

from studies.common.figures import COMPARED_BITS
from studies.common.outcome import Outcome
from studies.dense.confirmation import DENSE, MIXTURE, SIDES, Confirmed
from studies.dense.flip import steps_to
from training.figures import (
    GREY,
    MARKERS,
    WIDTH,
    add_legend,
    line_look,
    new_figure,
    set_loss_axes,
    smooth,
)

LOOKS = {side: line_look(index) for index, side in enumerate(SIDES)}
MARKS = dict(zip(SIDES, MARKERS, strict=False))


def draw(
    texts: Mapping[str, Confirmed], titles: Mapping[str, str], step_seconds: Mapping[str, float]
) -> Figure:
    """A row for each text: one line per seed over time, and means over seeds by length.

    Args:
        texts: what was found on each, by name.
        titles: what each side is called in the legend.
        step_seconds: time of each side's step.
    """
    ratio = step_seconds[MIXTURE] / step_seconds[DENSE]
    figure = new_figure(WIDTH, 0.6 + 3.3 * len(texts))
    rows = figure.subplots(len(texts), 2, squeeze=False)
    for (name, found), (by_time, by_length) in zip(texts.items(), rows, strict=True):
        draw_training(by_time, found, step_seconds)
        by_time.set_title(f"{name} text: training loss, smoothed", fontsize=10)
        draw_lengths(by_length, found, ratio)
        by_length.set_title(f"{name} text: held-out loss at the end of a run", fontsize=10)
        by_time.set_ylabel("bits per byte")
    by_time.set_xlabel("training time (seconds)")
    by_length.set_xlabel("optimizer steps of the run")
    handles = [
        Line2D([], [], marker=MARKS[side], label=titles[side], **LOOKS[side]) for side in SIDES
    ]
    add_legend(figure, handles, None)
    return figure


def draw_training(axes: Axes, found: Confirmed, step_seconds: Mapping[str, float]) -> None:
    """The longest run of each seed, in the time that its steps take."""
    lowest, lasts = [], []
    for side in SIDES:
        for one in found.runs[side][found.own(side)]:
            loss = smooth(np.array([record.loss for record in one.records], dtype=np.float64))
            axes.plot(seconds(one, step_seconds[side]), loss, **{**LOOKS[side], "linewidth": 1})
            lowest.append(loss.min())
            lasts.append(loss[-1])
    set_loss_axes(axes)
    axes.set_ylim(min(lowest) - 0.05, max(lasts) + COMPARED_BITS)


def seconds(one: Outcome, step_seconds: float) -> list[float]:
    """The time at each record of a run."""
    return [record.step * step_seconds for record in one.records]


def draw_lengths(axes: Axes, found: Confirmed, ratio: float) -> None:
    """Means over the seeds, and between both sides the steps that the same loss takes each."""
    means = {
        side: {steps: float(found.losses(side, steps).mean()) for steps in sorted(runs)}
        for side, runs in found.runs.items()
    }
    for side, curve in means.items():
        axes.plot([*curve], [*curve.values()], marker=MARKS[side], mfc="white", **LOOKS[side])
    loss = max(means[side][found.own(side)] for side in SIDES)
    ends = [steps_to(loss, means[side]) for side in SIDES]
    if not np.isnan(ends).any():
        axes.plot(ends, [loss, loss], color=GREY, linewidth=1, zorder=1)
    flip = found.flip().mean
    equal = "equal out of reach" if np.isnan(flip) else f"equal at {flip:.2f}"
    axes.text(  # both curves fall: there is room above their ends
        1.0,
        0.97,
        f"step time, {MIXTURE} over {DENSE}:\nmeasured {ratio:.2f}, {equal}",
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=9,
        color=GREY,
    )
    axes.set_xscale("log")
    axes.set_xticks(found.shared)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
