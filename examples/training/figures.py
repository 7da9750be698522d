"""The figures of a run, drawn from its records without a display.

A record is one logged interval of training, as train_lm writes it. The figures read `bytes` and
`seconds` (both since the start of training), `loss`, `domain_loss`, `held_out` where there is one,
and `load`, which is empty for a dense model.

Colours are those of Okabe and Ito for lines and PuOr for maps; both are told apart by people who do
not see all colours, and lines differ in their dashes and markers too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

from training.specialization import Specialization

Record = Mapping[str, Any]
Values = NDArray[np.float64]

DPI = 150
WIDTH = 9.0  # inches: at this size text of 9 points is readable where a README shows 900 pixels
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (7, 1.5, 1.5, 1.5)), (0, (1.5, 1)))
MARKERS = ("o", "s", "^", "v", "P", "X", "p")
GREY = "0.4"
MISSING = "0.85"
TOP_BITS = 4.5  # the first steps come from 8 bits and would flatten all that follows
LABEL_HEIGHT = 0.043  # of a line of text next to the axes, as a share of theirs
SMOOTHED_SHARE = 1 / 40  # of the records, to each side
# Purple below, white in the middle, orange above; without the ends, which are nearly black both.
MAP_COLOURS = ListedColormap(matplotlib.colormaps["PuOr_r"](np.linspace(0.08, 0.92, 256)))
BRIGHTNESS = np.array([0.299, 0.587, 0.114])  # of red, green and blue to the eye
SIDES = 2.2  # inches: what names and colour bar take next to the maps
NUMBERED_CELL = 0.2  # inches: a narrower cell has no room for its number


def save(figure: Figure, folder: Path, name: str) -> tuple[Path, Path]:
    """Writes NAME.png and NAME.svg and gives their paths; the same figure gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    # Each drawing starts the layout from the one before and moves it a little: one is enough.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    figure.savefig(png, metadata={"Software": None})
    # An SVG's ids are random without a salt, and it would hold the time of day.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return png, svg


# ---- loss


def loss_curves(
    records: Sequence[Record], ngrams: Mapping[int, float], final: Mapping[str, float] | None
) -> Figure:
    """The loss on each domain while the model trained, next to what n-gram models reach.

    Args:
        records: at least one.
        ngrams: bits per byte of held-out text, the mean over the domains, by order.
        final: bits per byte of each domain's held-out text after training, where it is known.
    """
    figure = new_figure(WIDTH, 4.8)
    axes = figure.subplots()
    x = bytes_read(records)
    names = list(dict.fromkeys(name for record in records for name in record["domain_loss"]))
    names += [name for name in final or {} if name not in names]
    held_out = {name: losses(records, "held_out", name) for name in names}
    handles: list[Line2D] = []
    labels: list[tuple[float, str, str]] = []  # value, text, colour
    lowest: list[float] = []  # what the y axis reaches down to
    highest = [TOP_BITS - 0.3]  # and up to

    for index, name in enumerate(names):
        look = line_look(index)
        marker = {"marker": MARKERS[index % len(MARKERS)], "color": look["color"]}
        at, raw = measured(x, losses(records, "domain_loss", name))
        loss = smooth(raw)
        single = "." if len(raw) == 1 else ""  # one point alone makes no line
        axes.plot(at, raw, color=look["color"], alpha=0.25, linewidth=0.8)
        axes.plot(at, loss, marker=single, **look)
        held_at, held = measured(x, held_out[name])
        axes.plot(held_at, held, linestyle="none", mfc="white", zorder=3, **marker)
        handles.append(Line2D([], [], mfc="white", label=name, **{**look, **marker}))
        lowest += [*loss, *held]
        highest += [*loss[-1:]]
        if final is not None:
            axes.plot(x[-1:], final[name], linestyle="none", zorder=3, **marker)
            labels.append((final[name], f"{name} {final[name]:.2f}", look["color"]))

    if len(names) > 1:  # the mean is what the n-gram models compare with
        mean: dict[str, Any] = {"color": "black", "marker": "D", "markersize": 4, "linewidth": 0.8}
        axes.plot(*measured(x, np.mean([*held_out.values()], axis=0)), zorder=3, **mean)
        handles.append(Line2D([], [], label="mean, held out", **mean))
        if final is not None:
            value = float(np.mean([final[name] for name in names]))
            axes.plot(x[-1:], value, zorder=3, **mean)
            labels.append((value, f"mean {value:.2f}", "black"))

    for order, value in ngrams.items():
        axes.axhline(value, color=GREY, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        labels.append((value, f"{order}-grams {value:.2f}", GREY))

    set_loss_axes(axes)
    labelled = [value for value, _, _ in labels]
    axes.set_ylim(min(lowest + labelled) - 0.15, max(highest + labelled) + 0.3)
    set_text_axis(axes)
    axes.set_ylabel("loss (bits per byte)")
    label_right(axes, labels)
    title = "line: training (pale: not smoothed)    marker: held-out text"
    title += " (filled: at the end)" if final is not None else ""
    add_legend(figure, handles, title)
    return figure


def bytes_read(records: Sequence[Record]) -> Values:
    """Bytes of text read by the end of each record, [N]."""
    return np.array([record["bytes"] for record in records], dtype=np.float64)


def losses(records: Sequence[Record], key: str, name: str) -> Values:
    """One domain's loss in each record, [N]; NaN where a record has none."""
    found = [(record.get(key) or {}).get(name) for record in records]
    return np.array([math.nan if loss is None else loss for loss in found], dtype=np.float64)


def measured(x: Values, y: Values) -> tuple[Values, Values]:
    """The points [N] that have a y."""
    has = ~np.isnan(y)
    return x[has], y[has]


def smooth(values: Values) -> Values:
    """The mean of each value and its neighbours, [N] to the same.

    There are as many before as after, so that the steep start is not bent; only near the end,
    where little changes, there are fewer after.
    """
    count = len(values)
    place = np.arange(count)
    reach = np.minimum(place, math.ceil(count * SMOOTHED_SHARE))
    first, behind = place - reach, np.minimum(place + reach + 1, count)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    means: Values = (sums[behind] - sums[first]) / (behind - first)
    return means


def line_look(index: int) -> dict[str, Any]:
    """How the line of the `index`-th domain or kind is drawn."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "linewidth": 1.6,
    }


def set_loss_axes(axes: Axes) -> None:
    """The frame of a loss curve, which starts at 0."""
    axes.set_xlim(left=0)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def set_text_axis(axes: Axes) -> None:
    """Names the x axis, which counts bytes of text."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    axes.set_xlabel("training text read")


def label_right(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Writes each (value, text, colour) next to the axes, moved up where two would overlap."""
    bottom, top = axes.get_ylim()
    free = bottom
    right = axes.get_yaxis_transform()  # x from 0 to 1 across the axes, y as in the data
    for value, text, colour in sorted(labels):
        y = max(value, free)
        free = y + LABEL_HEIGHT * (top - bottom)
        axes.plot([1, 1.03], [value, y], transform=right, color=colour, lw=0.6, clip_on=False)
        axes.text(1.035, y, text, transform=right, color=colour, fontsize=9, va="center")


def add_legend(
    figure: Figure, handles: Sequence[Line2D], title: str | None, columns: int = 4
) -> None:
    """A legend above the axes, where it hides nothing."""
    figure.legend(
        handles=handles,
        title=title,
        loc="outside upper center",
        ncols=min(columns, len(handles)),
        frameon=False,
        fontsize=10,
        title_fontsize=9,
        handlelength=3,
    )


# ---- experts


def expert_load(records: Sequence[Record]) -> Figure:
    """How much of its even share each expert took while the model trained, a panel per layer.

    Args:
        records: of a model with experts, at least one.

    Raises:
        ValueError: there are no experts.
    """
    loads = np.array([record["load"] for record in records], dtype=np.float64)  # [N, layers, E]
    if loads.size == 0:
        raise ValueError("records must have experts' loads, got none: a dense model has no experts")
    _, layers, experts = loads.shape
    rows, columns = grid_shape(layers, 2 if layers <= 6 else 4)
    height = min(2.6, max(1.3, 0.16 * experts))
    figure = new_figure(WIDTH, rows * (height + 0.3) + 0.4)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)

    relative = loads * experts
    inside = np.mean((relative >= 1 / 2) & (relative <= 2))
    limit = 1 if inside > 0.99 else 2  # a balanced layer is worth the finer scale
    edges = interval_edges(bytes_read(records))
    for layer, axes in enumerate(grid.flat):
        if layer >= layers:
            axes.set_axis_off()
            continue
        draw_map(axes, edges, relative[:, layer].T, limit)
        number_ticks(axes, experts, "y", height)
        axes.set_title(f"layer {layer}", fontsize=10)
        if layer + columns >= layers:  # nothing below
            axes.tick_params(labelbottom=True)
            set_text_axis(axes)
    figure.supylabel("expert", fontsize=10)
    add_colourbar(figure, grid, limit, "load (1 = even share)")
    return figure


def specialization(
    byte_class: Sequence[Specialization], domain: Sequence[Specialization]
) -> Figure:
    """How much more often each label is among each expert's bytes than in the text.

    Each layer is a column of two maps, classes above domains, with what the experts tell about the
    label in bits above each.

    Args:
        byte_class: one per layer.
        domain: one per layer.

    Raises:
        ValueError: there is no layer with experts.
    """
    if not byte_class:
        raise ValueError("byte_class must have a layer, got none: a dense model has no experts")
    layers, experts = len(byte_class), len(byte_class[0].lift)
    rows, columns = grid_shape(layers, 4 if experts <= 12 or layers > 6 else 2)
    width = min(WIDTH, SIDES + columns * max(2.0, 0.5 * experts))
    cell_width = (width - SIDES) / columns / experts
    numbered = cell_width >= NUMBERED_CELL
    cell_height = 0.21 if numbered else 0.17
    label_counts = len(byte_class[0].names), len(domain[0].names)
    figure = new_figure(width, rows * (cell_height * sum(label_counts) + 1.5) + 0.3)
    grid = figure.subplots(
        2 * rows, columns, squeeze=False, sharex=True, height_ratios=label_counts * rows
    )
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        pair = grid[2 * row : 2 * row + 2, column]
        if place >= layers:
            for axes in pair:
                axes.set_axis_off()
            continue
        for axes, found in zip(pair, (byte_class[place], domain[place]), strict=True):
            draw_lift(axes, found, numbered, named=column == 0)
        pair[0].set_title(f"layer {place}\n{pair[0].get_title()}", fontsize=8.5)
        number_ticks(pair[1], experts, "x", cell_width * experts)
        pair[1].tick_params(labelbottom=True)
        pair[1].set_xlabel("expert", fontsize=9)
    add_colourbar(figure, grid, 2, "share among the expert's bytes / share in the text")
    return figure


def draw_lift(axes: Axes, found: Specialization, numbered: bool, named: bool) -> None:
    """One map of labels x experts, its finding above it."""
    lift = found.lift.numpy().T  # [L, E]
    colours = draw_map(axes, np.arange(lift.shape[1] + 1) - 0.5, lift, 2)
    axes.set_title(found.in_words().replace("; ", "\n"), fontsize=8.5)
    axes.set_yticks(range(len(found.names)), found.names if named else [], fontsize=9)
    axes.invert_yaxis()
    axes.tick_params(length=0, labelbottom=False)
    if named:
        axes.set_ylabel(found.kind, fontsize=9)
    if numbered:
        dark = colours[..., :3] @ BRIGHTNESS < 0.5  # [L, E]
        for (label, expert), value in np.ndenumerate(lift):
            if math.isfinite(value):
                text = f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
                colour = "white" if dark[label, expert] else "black"
                axes.text(expert, label, text, ha="center", va="center", fontsize=7, color=colour)


def draw_map(axes: Axes, x_edges: Values, values: Values, limit: int) -> Values:
    """Cells [rows, columns] coloured by log2 from -limit to limit; NaN is grey.

    Gives their colours, [rows, columns, 4].
    """
    with np.errstate(divide="ignore"):
        logs = np.log2(values)
    cells = np.ma.masked_invalid(np.clip(logs, -limit, limit))  # 0 is the lower end, not missing
    axes.set_facecolor(MISSING)
    y_edges = np.arange(len(values) + 1) - 0.5
    mesh = axes.pcolormesh(
        x_edges, y_edges, cells, cmap=MAP_COLOURS, vmin=-limit, vmax=limit, rasterized=True
    )
    return np.asarray(mesh.to_rgba(cells))


def interval_edges(ends: Values) -> Values:
    """Where intervals start and end, [N+1], from their ends [N]; the first is as long as the next.

    A single interval starts at 0.
    """
    start = max(0.0, 2 * ends[0] - ends[1]) if len(ends) > 1 else 0.0
    return np.concatenate(([start], ends))


def grid_shape(panels: int, most_columns: int) -> tuple[int, int]:
    """Rows and columns that hold the panels, with as few left empty as may be."""
    rows = math.ceil(panels / most_columns)
    return rows, math.ceil(panels / rows)


def number_ticks(axes: Axes, experts: int, which: str, inches: float) -> None:
    """Numbers the experts along one axis: each where there is room, else some."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    if experts * 0.16 <= inches:
        axis.set_ticks(range(experts))
    else:
        axis.set_major_locator(
            MaxNLocator(nbins=max(2, int(inches / 0.4)), integer=True, steps=[1, 2, 4, 8, 10])
        )
    axis.set_tick_params(labelsize=8, length=0)


def add_colourbar(figure: Figure, grid: NDArray[Any], limit: int, label: str) -> None:
    """The scale of all maps, from 2^-limit to 2^limit."""
    colours = ScalarMappable(Normalize(-limit, limit), MAP_COLOURS)
    bar = figure.colorbar(colours, ax=grid, extend="both", aspect=30, fraction=0.03, pad=0.02)
    ticks = range(-limit, limit + 1)
    names = [f"1/{2**-tick}" if tick < 0 else str(2**tick) for tick in ticks]
    bar.set_ticks(list(ticks), labels=names)
    bar.set_label(label, fontsize=9)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")
