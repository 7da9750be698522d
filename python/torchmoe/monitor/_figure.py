"""The figure that `Watcher.plot` draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from torchmoe.monitor._history import Record, merged

_DPI = 200
_MOST_COLUMNS = 256  # of a map: more than can be told apart at its size
_FONT_SIZE = 8.0
_CHARACTER = 0.56 * _FONT_SIZE / 72  # inches, the width of a usual one
_ROW = 0.16  # inches, the height at which each expert gets a number
_SIDES = 1.5  # inches: what the numbers of the experts and the colour bar take
# Purple below the even share, white at it, orange above: apart for colour-blind eyes too. Without
# the ends, which are nearly black both: black is an expert without any load.
_COLOURS = ListedColormap(matplotlib.colormaps["PuOr_r"](np.linspace(0.1, 0.9, 256))).with_extremes(
    under="black"
)
_MISSING = "0.8"

Values = NDArray[np.float64]


class _Panel(NamedTuple):
    name: str
    edges: Values  # [N + 1] forward passes
    load: Values  # [E, N], 1 is the even share; NaN where nothing was routed


def draw_load(layers: Mapping[str, tuple[Sequence[Record], int]]) -> Figure:
    """A map of experts by forward passes for each layer, on one scale.

    Args:
        layers: the records of each layer, at least one, and how many passes there were.
    """
    panels = [_panel(name, records, seen) for name, (records, seen) in layers.items()]
    most_experts = max(len(panel.load) for panel in panels)
    rows, columns = _grid_shape(len(panels))
    width = 9.0 if columns <= 4 else 12.0
    panel_width = (width - _SIDES) / columns
    panel_height = min(
        max(1.4, _ROW * most_experts), 3.6 if rows == 1 else 2.4 if rows <= 3 else 1.6
    )
    figure = Figure(
        figsize=(width, rows * (panel_height + 0.3) + 0.5), dpi=_DPI, layout="constrained"
    )
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    limit = _limit(panels)
    for index, axes in enumerate(grid.flat):
        if index >= len(panels):
            axes.set_axis_off()
            continue
        _draw_map(axes, panels[index], limit, panel_width, panel_height)
        if index + columns >= len(panels):  # nothing below
            axes.tick_params(labelbottom=True)
    figure.supxlabel("forward pass", fontsize=_FONT_SIZE + 1)
    figure.supylabel("expert", fontsize=_FONT_SIZE + 1)
    _add_colour_bar(figure, grid, limit)
    return figure


def _panel(name: str, records: Sequence[Record], seen: int) -> _Panel:
    records = merged(list(records), math.ceil(len(records) / _MOST_COLUMNS))
    loads = np.array(
        [record.statistics().tokens_per_expert.tolist() for record in records], dtype=np.float64
    )
    totals = loads.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        relative = loads * loads.shape[1] / totals  # [N, E]
    edges = np.array([*(record.forward for record in records), seen], dtype=np.float64)
    return _Panel(name, edges, relative.T)


def _grid_shape(panels: int) -> tuple[int, int]:
    """Rows and columns that hold the panels, wider than high, with few places left empty."""
    most_columns = min(6, math.ceil(math.sqrt(1.4 * panels)))
    rows = math.ceil(panels / most_columns)
    return rows, math.ceil(panels / rows)


def _limit(panels: Sequence[_Panel]) -> int:
    """How many doublings of the even share the scale covers, so that few cells exceed it."""
    loads = np.concatenate([panel.load.ravel() for panel in panels])
    logs = np.abs(np.log2(loads[loads > 0]))
    for limit in (1, 2):
        if np.sum(logs > limit) <= 0.01 * len(logs):
            return limit
    return 3


def _draw_map(axes: Axes, panel: _Panel, limit: int, width: float, height: float) -> None:
    experts = len(panel.load)
    with np.errstate(divide="ignore"):
        logs = np.clip(np.log2(panel.load), -limit, limit)
    logs[panel.load == 0] = -limit - 1
    cells = np.ma.masked_invalid(logs)
    axes.set_facecolor(_MISSING)
    axes.pcolorfast(
        panel.edges, np.arange(experts + 1) - 0.5, cells, cmap=_COLOURS, vmin=-limit, vmax=limit
    )
    axes.tick_params(labelsize=_FONT_SIZE - 1, length=2, labelbottom=False)
    nbins = max(2, int(width / 0.6))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=nbins, integer=True, steps=[1, 2, 5, 10]))
    if experts * _ROW <= height:
        axes.set_yticks(range(experts))
    else:
        steps = [1, 2, 4, 8, 10]
        nbins = max(2, int(height / 0.3))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=nbins, integer=True, steps=steps))
    axes.set_title(_shortened(panel.name, int(width / _CHARACTER)), fontsize=_FONT_SIZE)


def _shortened(name: str, most: int) -> str:
    """The name, or its end, which tells layers apart."""
    return name if len(name) <= most else "…" + name[1 - most :]


def _add_colour_bar(figure: Figure, grid: NDArray[Any], limit: int) -> None:
    colours = ScalarMappable(Normalize(-limit, limit), _COLOURS)
    bar = figure.colorbar(
        colours, ax=grid, extend="both", aspect=20 + 10 * len(grid), fraction=0.03, pad=0.02
    )
    ticks = range(-limit, limit + 1)
    names = [f"1/{2**-tick}" if tick < 0 else str(2**tick) for tick in ticks]
    bar.set_ticks(list(ticks), labels=names)
    bar.ax.tick_params(labelsize=_FONT_SIZE)
    bar.set_label("load (1 = even share,\nblack = none)", fontsize=_FONT_SIZE + 1)
