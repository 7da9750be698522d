"""The figure that `RouterGeometry.plot` draws."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

_DPI = 200
_FONT_SIZE = 8.0
_SIZE = 6.0  # inches, of the map
_LEGEND_COLUMN = 0.5  # inches
_LEGEND_ROWS = 24
_MOST_TOKENS = 3000  # more would hide each other
# Okabe and Ito's, apart for colour-blind eyes too; grey in the place of black, which is for lines.
_COLOURS = (
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#8C8C8C",
)
_MARKERS = "os^DvP*X"
_GROUND = 0.42  # how much of its colour a region shows
_NUMBER = 0.6  # of its colour's brightness, for the number of a region
_INK = "0.1"
_FEW = 16  # experts: more have thinner arrows
_ARROW = 0.8  # of the way to the frame, for the longest one
_CHARACTER = 0.6 * _FONT_SIZE / 72 / _SIZE * 2  # of a map that is 2 wide

Values = NDArray[np.float64]


class Plane(NamedTuple):
    """A plane through the space of the rows, and the projections onto it."""

    middle: Values
    """[G]: the point of the plane at its coordinates (0, 0)."""
    directions: Values
    """[2, G]: unit vectors at a right angle."""
    shares: Values
    """[2]: the share of the rows' variance in each direction; 0 where there is none."""
    slopes: Values
    """[E, 2]: the rows minus their mean, in the plane."""
    heights: Values
    """[E]: the experts' logits at the middle, minus their mean."""


class Region(NamedTuple):
    """Where an expert has the largest logit: a convex part of the map."""

    corners: Values
    """[N, 2], counterclockwise."""
    neighbours: list[int]
    """[N]: the expert beyond the side from each corner to the next; -1 for the frame."""


def draw_plane(rows: Values, bias: Values, tokens: Values | None) -> Figure:
    """A map of the experts that win, with the rows as arrows and the tokens as dots.

    Args:
        rows: [E, G], two or more experts, and G >= 2.
        bias: [E].
        tokens: [T, G], one or more, or None.
    """
    plane = make_plane(rows, bias, tokens)
    shown, choices = None, None
    if tokens is not None:
        few = tokens[:: math.ceil(len(tokens) / _MOST_TOKENS)]
        shown = (few - plane.middle) @ plane.directions.T
        choices = np.argmax(few @ rows.T + bias, axis=1)
    reach = _reach(plane, shown)
    regions = make_regions(plane, reach)
    styles = make_styles(len(rows), regions)

    legend = [] if choices is None else sorted(set(choices.tolist()))
    columns = math.ceil(len(legend) / _LEGEND_ROWS)
    # Wider than the square map needs: its height then decides, and the layout settles at once.
    width = _SIZE + 1.1 + _LEGEND_COLUMN * columns + (0.2 if columns else 0)
    figure = Figure(figsize=(width, _SIZE + 0.9), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-reach, reach)
    axes.set_aspect("equal")
    _draw_regions(axes, regions, reach, styles)
    if shown is not None and choices is not None:
        _draw_tokens(axes, shown, choices, styles)
    _draw_arrows(axes, plane.slopes, reach, styles)
    _label_axes(axes, plane, tokens, shown, reach)
    if legend:
        _add_legend(figure, legend, columns, styles)
    return figure


def make_plane(rows: Values, bias: Values, tokens: Values | None) -> Plane:
    """The plane in which the rows differ most, through the mean of the tokens or 0."""
    middle = np.zeros(rows.shape[1]) if tokens is None else tokens.mean(axis=0)
    mean = rows.mean(axis=0)
    # One vector more in every row changes no difference between logits, so it must not turn the
    # plane.
    centred = rows - mean
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    variances = sizes**2
    total = variances.sum()
    # What rounding leaves of equal rows, or of a second direction, is no direction.
    noise = (np.finfo(np.float64).eps * max(rows.shape) * np.abs(rows).max()) ** 2 * rows.size
    directions = directions[:2].copy()
    if variances[1] <= noise:
        rest = mean - mean @ directions[0] * directions[0]
        length = np.linalg.norm(rest)
        if length > 1e-6 * np.linalg.norm(mean):
            directions[1] = rest / length
    # The signs of singular vectors are arbitrary: the same figure on every machine.
    largest = np.abs(directions).argmax(axis=1)
    directions *= np.sign(directions[[0, 1], largest])[:, None]
    shares = np.where(variances[:2] > noise, variances[:2] / max(total, noise or 1.0), 0.0)
    heights = centred @ middle + bias
    return Plane(middle, directions, shares, centred @ directions.T, heights - heights.mean())


def _reach(plane: Plane, shown: Values | None) -> float:
    """How far the map extends from its middle, on each side."""
    if shown is not None:
        # A few tokens far away must not press the others into a spot.
        reach = 1.1 * float(np.quantile(np.abs(shown).max(axis=1), 0.99))
        if reach > 0:
            return reach
    first, second = np.triu_indices(len(plane.slopes), 1)
    spans = np.linalg.norm(plane.slopes[first] - plane.slopes[second], axis=1)
    gaps = np.abs(plane.heights[first] - plane.heights[second])
    met = spans > 1e-9 * spans.max(initial=0.0)
    # Boundaries beyond are those of rows that hardly differ.
    reach = 2 * float(np.quantile(gaps[met] / spans[met], 0.5)) if met.any() else 0.0
    return reach if reach > 0 else 1.0


def make_regions(plane: Plane, reach: float) -> dict[int, Region]:
    """The regions of the experts that win somewhere in the square of that reach."""
    regions = {}
    frame = reach * np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    for expert, (slope, height) in enumerate(zip(plane.slopes, plane.heights, strict=True)):
        region = Region(frame, [-1] * 4)
        for other in range(len(plane.slopes)):
            if other != expert and len(region.corners):
                lead = region.corners @ (slope - plane.slopes[other])
                lead += height - plane.heights[other]
                if other < expert:
                    # Ties go to the lower id: of experts that are equal here the first has it all.
                    lead = np.where(lead == 0, -np.finfo(np.float64).tiny, lead)
                region = _cut(region, lead, other)
        if _area(region.corners) > 1e-9 * reach**2:
            regions[expert] = region
    return regions


def _cut(region: Region, lead: Values, other: int) -> Region:
    """The part of the region in which the linear function with these corner values is >= 0."""
    if (lead >= 0).all():
        return region
    corners: list[Values] = []
    neighbours: list[int] = []
    for here, (corner, neighbour) in enumerate(zip(region.corners, region.neighbours, strict=True)):
        there = (here + 1) % len(lead)
        crosses = (lead[here] >= 0) != (lead[there] >= 0)
        if lead[here] >= 0:
            corners.append(corner)
            neighbours.append(neighbour)
        if crosses:
            part = lead[here] / (lead[here] - lead[there])
            corners.append(corner + part * (region.corners[there] - corner))
            neighbours.append(other if lead[here] >= 0 else neighbour)
    return Region(np.array(corners).reshape(-1, 2), neighbours)


def _area(corners: Values) -> float:
    x, y = corners.T if len(corners) else np.zeros((2, 1))
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2


class _Style(NamedTuple):
    colour: str
    marker: str


def make_styles(experts: int, regions: dict[int, Region]) -> list[_Style]:
    """A colour and a marker for each expert; no two neighbouring regions have one colour.

    Each pair is used once before any is used again.
    """
    if experts <= len(_COLOURS):
        return [_Style(colour, _MARKERS[0]) for colour in _COLOURS[:experts]]
    colours: dict[int, int] = {}
    used: Counter[int] = Counter()
    adjacent: dict[int, set[int]] = {expert: set() for expert in range(experts)}
    for expert, region in regions.items():
        for other in region.neighbours:
            if other >= 0:
                adjacent[expert].add(other)
                adjacent[other].add(expert)

    def crowded(expert: int) -> tuple[int, int]:
        return -len(adjacent[expert]), expert

    for expert in sorted(range(experts), key=crowded):
        taken = {colours[other] for other in adjacent[expert] if other in colours}
        free = [colour for colour in range(len(_COLOURS)) if colour not in taken]
        colour = min(free or range(len(_COLOURS)), key=lambda colour: (used[colour], colour))
        colours[expert] = colour
        used[colour] += 1
    nth: Counter[int] = Counter()
    styles = []
    for expert in range(experts):
        colour = colours[expert]
        styles.append(_Style(_COLOURS[colour], _MARKERS[nth[colour] % len(_MARKERS)]))
        nth[colour] += 1
    return styles


def _draw_regions(
    axes: Axes, regions: dict[int, Region], reach: float, styles: Sequence[_Style]
) -> None:
    for expert, region in regions.items():
        ground = 1 - _GROUND * (1 - np.array(to_rgb(styles[expert].colour)))
        axes.fill(*region.corners.T, facecolor=ground, edgecolor="none", zorder=0)
    for expert, region in regions.items():
        after = np.roll(region.corners, -1, axis=0)
        for start, end, other in zip(region.corners, after, region.neighbours, strict=True):
            if other > expert or (other >= 0 and other not in regions):
                axes.plot(*zip(start, end, strict=True), color="0.35", linewidth=0.9, zorder=1)
        place, room = _number_place(region, reach)
        points = min(18.0, room / reach * _SIZE / 2 * 72)
        if points >= _FONT_SIZE - 2:
            axes.text(
                place[0],
                place[1],
                str(expert),
                fontsize=points,
                ha="center",
                va="center_baseline",
                color=tuple(_NUMBER * np.array(to_rgb(styles[expert].colour))),
                zorder=1,
            )


def _number_place(region: Region, reach: float) -> tuple[Values, float]:
    """A place in the region for its number, off the arrows, and how far the sides are from it."""
    low, high = region.corners.min(axis=0), region.corners.max(axis=0)
    grid = np.stack(np.meshgrid(*np.linspace(low, high, 32).T), axis=-1).reshape(-1, 2)
    sides = np.roll(region.corners, -1, axis=0) - region.corners
    lengths = np.linalg.norm(sides, axis=1)
    kept = lengths > 1e-9 * reach
    inward = np.stack([-sides[:, 1], sides[:, 0]], axis=1)[kept] / lengths[kept, None]
    offsets = np.sum(inward * region.corners[kept], axis=1)
    room = (grid @ inward.T - offsets).min(axis=1)
    # Room for the number counts, more room does not: then the way from the middle, where arrows
    # begin.
    score = np.minimum(room, 0.12 * reach) + 0.1 * np.linalg.norm(grid, axis=1)
    best = score.argmax()
    return grid[best], float(room[best])


def _draw_tokens(
    axes: Axes, shown: Values, choices: NDArray[np.int64], styles: Sequence[_Style]
) -> None:
    area = float(np.clip(9000 / len(shown), 9, 36))  # square points
    for expert in sorted(set(choices.tolist())):
        own = shown[choices == expert]
        axes.scatter(
            own[:, 0],
            own[:, 1],
            s=area,
            c=styles[expert].colour,
            marker=styles[expert].marker,
            edgecolors="black",
            linewidths=0.35,
            zorder=2,
        )


def _draw_arrows(axes: Axes, slopes: Values, reach: float, styles: Sequence[_Style]) -> None:
    lengths = np.linalg.norm(slopes, axis=1)
    if not lengths.max() > 0:
        return
    tips = slopes * (_ARROW / lengths.max())  # of a map that is 2 wide
    few = len(tips) <= _FEW
    for expert, tip in enumerate(tips):
        axes.annotate(
            "",
            tip * reach,
            (0, 0),
            arrowprops={
                "arrowstyle": "-|>,head_length=0.45,head_width=0.2",
                "facecolor": styles[expert].colour,
                "edgecolor": _INK,
                "linewidth": 0.8 if few else 0.4,
                "shrinkA": 0,
                "shrinkB": 0,
                "path_effects": [withStroke(linewidth=2.0 if few else 0.8, foreground="white")],
            },
            zorder=3,
        )
    for expert, place in enumerate(_label_places(tips)):
        axes.text(
            place[0] * reach,
            place[1] * reach,
            str(expert),
            fontsize=_FONT_SIZE if few else _FONT_SIZE - 1,
            fontweight="bold",
            ha="center",
            va="center_baseline",
            color=_INK,
            path_effects=[withStroke(linewidth=2.0, foreground="white")],
            zorder=4,
        )


def _label_places(tips: Values) -> Values:
    """Where the arrows' numbers go: beyond the tips [E, 2], apart from each other and the heads."""
    widths = np.array([len(str(expert)) + 0.5 for expert in range(len(tips))])
    sizes = _CHARACTER * np.stack([widths, np.full(len(tips), 1.9)], axis=1)
    lengths = np.linalg.norm(tips, axis=1)
    along = tips / np.where(lengths > 0, lengths, 1)[:, None]
    heads = tips - 0.6 * _CHARACTER * along
    head_size = np.full(2, 1.4 * _CHARACTER)
    turns = np.tile(np.linspace(-math.pi, math.pi, 16, endpoint=False), 4)
    far = np.repeat(_CHARACTER * np.array([1.7, 2.4, 3.2, 4.0]), 16)
    places = np.zeros_like(tips)
    placed: list[int] = []
    # The long ones first, whose places are the free ones outside.
    for expert in np.argsort(-lengths, kind="stable").tolist():
        angles = math.atan2(tips[expert, 1], tips[expert, 0]) + turns
        options = tips[expert] + far[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        size = sizes[expert]
        crowding = 2 * _overlaps(options, size, places[placed], sizes[placed])
        crowding += _overlaps(options, size, heads, head_size)
        crowding += 0.5 * far + 0.01 * np.abs(turns)
        places[expert] = options[crowding.argmin()]
        placed.append(expert)
    return places


def _overlaps(centres: Values, size: Values, others: Values, other_sizes: Values) -> Values:
    """How much of a box at each centre [N, 2] the boxes at the others [M, 2] cover: [N]."""
    apart = np.abs(centres[:, None] - others)  # [N, M, 2]
    inside = np.clip((size + other_sizes) / 2 - apart, 0, np.minimum(size, other_sizes))
    covered: Values = inside.prod(axis=2).sum(axis=1) / size.prod()
    return covered


def _label_axes(
    axes: Axes, plane: Plane, tokens: Values | None, shown: Values | None, reach: float
) -> None:
    axes.tick_params(labelsize=_FONT_SIZE - 1, length=2)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7))
    names = [
        f"direction {number} ({100 * share:.0f} % of the rows' variance)"
        for number, share in enumerate(plane.shares.tolist(), 1)
    ]
    axes.set_xlabel(names[0], fontsize=_FONT_SIZE + 1)
    axes.set_ylabel(names[1], fontsize=_FONT_SIZE + 1)
    through = "0" if tokens is None else "the tokens' mean"
    lines = [f"ground: the expert that wins in the plane through {through}"]
    lines.append("arrows: each expert's row minus the mean row")
    if tokens is not None and shown is not None:
        beyond = int((np.abs(shown) > reach).any(axis=1).sum())
        count = f"{len(shown)} of {len(tokens)}" if len(shown) < len(tokens) else str(len(shown))
        outside = f", {beyond} beyond the frame" if beyond else ""
        lines[1] += f"; dots: {count} tokens by first choice{outside}"
    axes.set_title("\n".join(lines), fontsize=_FONT_SIZE)


def _add_legend(
    figure: Figure, experts: Sequence[int], columns: int, styles: Sequence[_Style]
) -> None:
    handles: list[Any] = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=styles[expert].marker,
            markersize=6,
            markerfacecolor=styles[expert].colour,
            markeredgecolor="black",
            markeredgewidth=0.5,
            label=str(expert),
        )
        for expert in experts
    ]
    figure.legend(
        handles=handles,
        loc="outside right upper",
        ncols=columns,
        title="first choice",
        fontsize=_FONT_SIZE,
        title_fontsize=_FONT_SIZE,
        handletextpad=0.2,
        columnspacing=0.8,
        frameon=False,
    )
