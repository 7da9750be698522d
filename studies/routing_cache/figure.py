"""The picture: a panel for each question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from studies.common.intervals import t_interval
from studies.routing_cache import timing
from studies.routing_cache.queries import QUERIES
from studies.routing_cache.scale import CONFIDENCE, SIMILARITIES
from training.figures import GREY, MARKERS, WIDTH, Values, line_look, new_figure, smooth

if TYPE_CHECKING:
    from studies.routing_cache.report import Everything

PLACES = np.arange(float(len(SIMILARITIES)))  # of the similarities, evenly spread
SHOWN_ROUTER = "sequence_attention"


def draw(found: Everything) -> Figure:
    """All of it."""
    figure = new_figure(WIDTH, 10.5)
    (queries, hits), (change, training), (stream, time) = figure.subplots(3, 2)
    draw_queries(queries, found)
    draw_hits(hits, found)
    draw_change(change, found)
    draw_training(training, found)
    draw_stream(stream, found)
    draw_time(time, found)
    for axes in (queries, hits, change):
        axes.set_xlabel("similarity")
        axes.xaxis.set_major_locator(FixedLocator(range(len(SIMILARITIES))))
        axes.xaxis.set_major_formatter(FixedFormatter([f"{s:g}" for s in SIMILARITIES]))
        axes.xaxis.set_minor_locator(NullLocator())
    for axes in (training, stream):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    for axes in (queries, hits, training, stream):
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylabel("gate inputs that hit")
    hits.set_ylabel("share")
    for axes in figure.axes:
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=True, framealpha=0.8, edgecolor="none")
    return figure


def draw_queries(axes: Axes, found: Everything) -> None:
    """Texts that come again: a line for how much of them is new."""
    axes.set_title("texts that come again, routed whole", fontsize=10)
    some = found.queries.get(SHOWN_ROUTER) or next(iter(found.queries.values()))
    for place, query in enumerate(QUERIES):
        draw_line(
            axes,
            PLACES,
            [[one.answers[s][query].hit_rate.mean() for s in SIMILARITIES] for one in some],
            f"{query} new" if "%" in query else query,
            place,
        )


def draw_hits(axes: Axes, found: Everything) -> None:
    """The bytes of held-out text, and how often the router would have chosen the same."""
    axes.set_title("bytes of held-out text, mean of layers", fontsize=10)
    for place, size in enumerate(found.scale.sizes):
        by_size(axes, found, size, place, lambda one: one.hit_rate.mean(), f"hits, {size} entries")
    by_size(
        axes,
        found,
        found.scale.sizes[-1],
        len(found.scale.sizes),
        lambda one: float(np.nanmean(one.agreement)) if one.hit_rate.any() else np.nan,
        f"experts as chosen,\n{found.scale.sizes[-1]} entries",
    )


def draw_change(axes: Axes, found: Everything) -> None:
    """What the caches do to the loss."""
    axes.set_title("held-out text: loss with caches less without", fontsize=10)
    axes.set_ylabel("millibits per byte")
    axes.axhline(0, color=GREY, linewidth=1, zorder=1.5)
    for place, size in enumerate(found.scale.sizes):
        by_size(axes, found, size, place, lambda one: 1000 * one.change, f"{size} entries")


def by_size(
    axes: Axes, found: Everything, size: int, place: int, pick: Callable[[Any], float], name: str
) -> None:
    """One number of the caches of a size, by similarity."""
    rows = [[pick(one[size][s]) for s in SIMILARITIES] for one in found.text]
    draw_line(axes, PLACES, rows, name, place)


def draw_training(axes: Axes, found: Everything) -> None:
    """Hits and entries that outlive a step while the model trains."""
    axes.set_title("while the model trains, smoothed", fontsize=10)
    axes.set_xlabel("optimizer steps")
    steps = np.arange(1.0, found.scale.steps + 1)
    for place, (similarity, some) in enumerate(found.trained.items()):
        rates = [smooth(one.hit_rate) for one in some]
        draw_line(axes, steps, rates, f"hits at {similarity:g}", place, marker="")
    alive = [smooth(np.nan_to_num(one.alive, nan=1.0)) for one in some]
    name = f"entries that outlive\na step, at {similarity:g}"
    draw_line(axes, steps, alive, name, len(found.trained), marker="")


def draw_stream(axes: Axes, found: Everything) -> None:
    """One domain after another."""
    axes.set_title("one domain after another", fontsize=10)
    axes.set_xlabel("steps")
    for place, eviction in enumerate(found.stream[0]):
        rates = [one[eviction] for one in found.stream]
        draw_line(axes, np.arange(1.0, len(rates[0]) + 1), rates, eviction, place, marker="")
    for place, name in enumerate(found.order):
        start = place * found.scale.segment + 0.5
        if place:
            axes.axvline(start, color=GREY, linewidth=1, linestyle=(0, (2, 2)))
        axes.text(start, 0.01, f" {name}", fontsize=8, color=GREY)


def draw_time(axes: Axes, found: Everything) -> None:
    """Whole layers whose router is left out: measured, and by the formula."""
    axes.set_title("every lookup hits, router left out", fontsize=10)
    axes.set_xlabel("multiplications of the router / of its lookup")
    axes.set_ylabel("layer's time with cache / without")
    axes.set_xscale("log")
    axes.axhline(1, color=GREY, linewidth=1, zorder=1.5)
    deep = [case for case in found.cases if case.group == timing.DEEP]
    costs = timing.costs_of(deep)
    for place, (rows, cases) in enumerate(timing.by_gate_inputs(deep).items()):
        work = [case.work for case in cases]
        look = line_look(place)
        axes.plot(work, [costs.ratio(case) for case in cases], **look)
        ratios = [case.ratio for case in cases]
        label = f"MLP, {rows} tokens"
        axes.plot(work, ratios, MARKERS[place], color=look["color"], mfc="white", label=label)
    linear = [case for case in found.cases if case.group == timing.LINEAR]
    ratios = [case.ratio for case in linear]
    axes.plot([case.work for case in linear], ratios, "x", color="black", label="linear router")
    axes.plot([], [], color=GREY, label="formula")


def draw_line(
    axes: Axes,
    x: Values,
    rows: Sequence[Sequence[float] | Values],
    name: str,
    place: int,
    marker: str | None = None,
) -> None:
    """The mean of the seeds [S, N], and a band for its interval where there is one."""
    mean, low, high = t_interval(np.array(rows, dtype=np.float64), CONFIDENCE)
    look = line_look(place)
    mark = MARKERS[place % len(MARKERS)] if marker is None else marker
    axes.plot(x, mean, marker=mark, markersize=4, mfc="white", label=name, **look)
    axes.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)
