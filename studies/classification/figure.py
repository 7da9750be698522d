"""The picture: accuracies, which expert serves which class, and what attention pools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from studies.classification.display import (
    LAST,
    POOLED,
    one_line,
    pooled_weights,
    short_names,
    shown_texts,
)
from studies.classification.evaluation import by_class, wilson
from studies.classification.model import EXPERTS
from studies.classification.texts import Task
from studies.classification.training import Run
from studies.classification.yardsticks import Yardstick
from training import figures
from training.routers import is_pooled

MAP_COLUMNS = 4
ROW = 64  # bytes of a text in a row of bars
TOKEN, SEQUENCE = figures.COLOURS[0], figures.COLOURS[1]


def draw(
    task: Task, yardsticks: Mapping[str, Yardstick], runs: Mapping[str, Sequence[Run]]
) -> Figure:
    """All of it, from top to bottom."""
    rows, columns = figures.grid_shape(len(runs), MAP_COLUMNS)
    heights = [
        0.24 * len(runs) + 1.3,
        rows * (0.17 * len(task.classes) + 0.6) + 0.3,
    ]
    pools = POOLED in runs
    if pools:
        text = shown_texts(task)[0]
        written = one_line(task.test.bytes_of(text))
        heights.append(0.95 * -(-len(written) // ROW) + 0.5)
    whole = figures.new_figure(figures.WIDTH, sum(heights))
    parts = whole.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    draw_accuracy(parts[0], task, yardsticks, runs)
    draw_classes(parts[1], task, runs, rows, columns)
    if pools:
        weights = pooled_weights(task, runs, text).tolist()
        label = task.classes[task.test.labels[text]]
        draw_pooling(parts[2], label, written, weights)
    return whole


def draw_accuracy(
    part: SubFigure,
    task: Task,
    yardsticks: Mapping[str, Yardstick],
    runs: Mapping[str, Sequence[Run]],
) -> None:
    """A bar for each router with its interval, a line for each yardstick."""
    axes = part.subplots()
    for place, (name, some) in enumerate(runs.items()):
        accuracies = [run.findings.score.accuracy for run in some]
        mean = fmean(accuracies)
        low, high = wilson(mean, len(task.test))
        colour = SEQUENCE if is_pooled(name) else TOKEN
        axes.barh(place, 100 * mean, color=colour, alpha=0.55, height=0.7)
        axes.plot([100 * low, 100 * high], [place] * 2, color="black", linewidth=1.2)
        dots = [100 * accuracy for accuracy in accuracies]
        axes.plot(dots, [place] * len(dots), ".", color="black", markersize=5)
        axes.text(101, place, f"{100 * mean:.1f}", va="center", fontsize=9)
    handles = [
        Line2D([], [], color=colour, alpha=0.55, linewidth=6, label=f"decides for {whom}")
        for colour, whom in ((TOKEN, "each byte"), (SEQUENCE, "a whole text"))
    ]
    for place, (name, yardstick) in enumerate(yardsticks.items()):
        look = {"color": figures.GREY, "linewidth": 1.2, "linestyle": figures.DASHES[place]}
        axes.axvline(100 * yardstick.accuracy, **look)
        handles.append(Line2D([], [], label=f"{name} {100 * yardstick.accuracy:.1f}", **look))
    axes.set_yticks(range(len(runs)), list(runs), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(
        f"accuracy on {len(task.test):,d} unseen texts (%), task: {task.name}; line: 95 % interval,"
        " dots: seeds",
        fontsize=9,
    )
    part.legend(
        handles=handles,
        loc="outside upper center",
        ncols=3,
        frameon=False,
        fontsize=9,
        handlelength=3,
    )


def draw_classes(
    part: SubFigure, task: Task, runs: Mapping[str, Sequence[Run]], rows: int, columns: int
) -> None:
    """A map of classes x experts for each router."""
    grid = part.subplots(rows, columns, squeeze=False, sharex=True)
    edges = np.arange(EXPERTS + 1, dtype=np.float64) - 0.5
    for place, axes in enumerate(grid.flat):
        if place >= len(runs):
            axes.set_axis_off()
            continue
        name, some = list(runs.items())[place]
        shares = by_class(some[0].findings.shares, task.test.labels, len(task.classes))[LAST]
        relative = np.array((EXPERTS * shares).tolist(), dtype=np.float64)
        figures.draw_map(axes, edges, relative, 2)
        axes.set_title(name, fontsize=9)
        named = place % columns == 0
        axes.set_yticks(range(len(task.classes)), short_names(task) if named else [], fontsize=8)
        axes.invert_yaxis()
        axes.tick_params(length=0)
        figures.number_ticks(axes, EXPERTS, "x", 1.5)
        if place + columns >= len(runs):
            axes.tick_params(labelbottom=True)
    part.supxlabel("expert (last block, first seed)", fontsize=9)
    whole = part.figure
    assert isinstance(whole, Figure)
    figures.add_colourbar(whole, grid, 2, "slots / even share")


def draw_pooling(part: SubFigure, label: str, written: str, weights: Sequence[float]) -> None:
    """The weight of each byte of a text as a bar, its character below."""
    rows = -(-len(written) // ROW)
    grid = part.subplots(rows, 1, squeeze=False, sharey=True)
    for row, axes in enumerate(grid[:, 0]):
        start = row * ROW
        draw_row(axes, written[start : start + ROW], weights[1 + start : 1 + start + ROW])
    part.suptitle(
        f"sequence_attention: pooling weight of each byte (%), a text of {label}, last block; "
        f"CLS has {100 * weights[0]:.1f}",
        fontsize=9,
    )


def draw_row(axes: Axes, characters: str, weights: Sequence[float]) -> None:
    """One row of bars."""
    axes.bar(range(len(weights)), [100 * weight for weight in weights], color=SEQUENCE, width=0.8)
    axes.set_xlim(-0.6, ROW - 0.4)
    axes.set_xticks(
        range(len(characters)), list(characters), family="monospace", fontsize=9, parse_math=False
    )
    axes.tick_params(axis="x", length=0)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
