"""The figures of the benchmarks, drawn without a display.

Colours are those of Okabe and Ito, told apart by people who do not see all colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from benchmarks.contenders import IN_FLOAT32, LOOP, OURS
from benchmarks.moe_layer import Result
from benchmarks.traffic import READS

DPI = 150
WIDTH = 9.0  # inches
COLOURS = {
    OURS: "#0072B2",
    IN_FLOAT32: "#56B4E9",
    "transformers grouped_mm": "#E69F00",
    "transformers eager": "#D55E00",
    LOOP: "#CC79A7",
}
GREY, PEAK, MEMORY = "0.45", "#009E73", "black"
HIGHEST = 4.0  # times the dense bound: longer bars are cut and say how long they are
BARS = 0.8  # of a group's width


def new_figure(height: float) -> Figure:
    """Empty, with room kept between its parts."""
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


def clear(axes: Axes, grid: str = "y") -> None:
    """No box around, and light lines behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="both" if grid == "both" else "y", color="0.9")


# ---- the layer and its peers


def layers(results: Sequence[Result]) -> Figure:
    """Times over the dense bound's, a group of bars for each shape."""
    kinds = [
        (title, some)
        for title, some in (
            ("training step", [result for result in results if not result.case.forward_only]),
            ("forward only", [result for result in results if result.case.forward_only]),
        )
        if some
    ]
    figure = new_figure(4.2)
    widths = [len(some) + 0.3 for _, some in kinds]
    row = figure.subplots(1, len(kinds), squeeze=False, width_ratios=widths)[0]
    for axes, (title, some) in zip(row, kinds, strict=True):
        draw_layers(axes, some)
        axes.set_title(title, fontsize=10)
    row[0].set_ylabel("time over that of dense torch.mm")
    names = list(dict.fromkeys(name for result in results for name in others(result)))
    handles: list[Patch | Line2D] = [Patch(color=COLOURS[name], label=name) for name in names]
    handles.append(Line2D([], [], color=GREY, label="dense torch.mm"))
    handles += [
        Line2D([], [], color=PEAK, linewidth=2, label=f"{peak} peak")
        for peak in dict.fromkeys(result.peak for result in results)
    ]
    if any(READS in result.rows for result in results):
        handles.append(Line2D([], [], color=MEMORY, linewidth=2, label=READS))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return figure


def others(result: Result) -> list[str]:
    """The layers: what has a colour."""
    return [name for name in result.rows if name in COLOURS]


def draw_layers(axes: Axes, results: Sequence[Result]) -> None:
    """Bars, the dense bound at 1, and for each shape what the peak and the memory allow."""
    tallest = max(result.rows[name].min_over_dense for result in results for name in others(result))
    # Where all are slow there is nothing to cut.
    least = max(result.rows[OURS].min_over_dense for result in results)
    top = min(1.12 * tallest, max(HIGHEST, 2 * least))
    for place, result in enumerate(results):
        names = others(result)
        width = BARS / len(names)
        for index, name in enumerate(names):
            x = place - BARS / 2 + width * (index + 0.5)
            value = result.rows[name].min_over_dense
            axes.bar(x, min(value, top), 0.92 * width, color=COLOURS[name])
            cut = value > 0.97 * top
            axes.annotate(
                f"{value:.1f}" if value >= 10 else f"{value:.2f}",
                (x, min(value, top)),
                xytext=(0, -4 if cut else 2),
                textcoords="offset points",
                ha="center",
                va="top" if cut else "bottom",
                rotation=90 if cut else 0,
                fontsize=7,
                color="white" if cut else "black",
            )
        dense = result.block.times[result.dense].low
        at_peak = result.case.flops / result.peak_of(OURS) / dense
        bounds = {PEAK: at_peak}
        if READS in result.rows:
            bounds[MEMORY] = result.rows[READS].min_over_dense
        for colour, height in bounds.items():
            axes.plot([place - 0.46, place + 0.46], [height, height], color=colour, linewidth=2)
    axes.axhline(1, color=GREY, linewidth=1)
    axes.set_ylim(0, top)
    axes.set_xlim(-0.6, len(results) - 0.4)
    labels = [str(result.case.shape).replace(", ", ",") for result in results]
    axes.set_xticks(range(len(results)), labels, fontsize=7)
    axes.set_xlabel("T,H,I,E,K", fontsize=8)
    clear(axes)


# ---- products


def products(shares: Mapping[str, Mapping[str, tuple[float, float]]]) -> Figure:
    """By shape and product, the share of the FMA peak of ours and of torch.mm."""
    figure = new_figure(3.6)
    row = figure.subplots(1, len(shares), squeeze=False, sharey=True)[0]
    for axes, (shape, found) in zip(row, shares.items(), strict=True):
        places = np.arange(len(found))
        ours, dense = zip(*found.values(), strict=True)
        axes.barh(places - 0.2, ours, 0.38, color=COLOURS[OURS])
        axes.barh(places + 0.2, dense, 0.38, color="0.7")
        axes.axvline(1, color=PEAK, linewidth=2)
        axes.set_xlim(0, max(1.05, *ours, *dense))
        axes.set_yticks(places, list(found))
        axes.set_title(shape.replace(", ", ","), fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="x", color="0.9")
    row[0].invert_yaxis()
    figure.supxlabel("share of the FMA peak", fontsize=10)
    handles: list[Patch | Line2D] = [
        Patch(color=COLOURS[OURS], label="grouped_linear and its backward"),
        Patch(color="0.7", label="one torch.mm over all rows"),
        Line2D([], [], color=PEAK, linewidth=2, label="FMA peak"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return figure


# ---- growth


def growth(curves: Mapping[str, tuple[Sequence[int], Sequence[float], bool]]) -> Figure:
    """Time against size, next to growth in proportion to the work; both axes are logarithmic."""
    figure = new_figure(3.4)
    row = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (title, (sizes, seconds, grows)) in zip(row, curves.items(), strict=True):
        name, _, fixed = title.partition("\n")
        milliseconds = 1e3 * np.asarray(seconds)
        base = milliseconds[-1]
        ideal = [base * size / sizes[-1] if grows else milliseconds[0] for size in sizes]
        axes.plot(sizes, ideal, color=GREY, linestyle="--", linewidth=1)
        axes.plot(sizes, milliseconds, color=COLOURS[OURS], marker="o", markersize=4)
        axes.set_xscale("log", base=2)
        low, high = min(*milliseconds, *ideal), max(*milliseconds, *ideal)
        if grows:
            axes.set_yscale("log")
            axes.set_ylim(low / 1.6, high * 1.6)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(0, 1.2 * high)
        labels = [f"{size // 1024}k" if size % 1024 == 0 else f"{size}" for size in sizes]
        axes.set_xticks(list(sizes), labels)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(f"{name}\n{fixed}", fontsize=9)
        clear(axes, "both")
    row[0].set_ylabel("ms a step")
    handles = [
        Line2D([], [], color=COLOURS[OURS], marker="o", markersize=4, label="measured"),
        Line2D([], [], color=GREY, linestyle="--", label="in proportion to the work"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    return figure
