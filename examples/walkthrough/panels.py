"""What the picture's panels are made of: titles, maps of numbers, bars, and the experts' colours.

An expert has the same colour in every panel: the first choice, the second and the backup each have
one of Okabe and Ito's, told apart by people who do not see all colours, and the others are grey.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from numpy.typing import NDArray
from torch import Tensor

from training import figures
from walkthrough import made_up
from walkthrough.made_up import EXPERTS, POETRY, SCIENCE

BACKUP = made_up.BACKUP[POETRY]
OTHER = "0.72"
COLOURS = {POETRY: figures.COLOURS[0], SCIENCE: figures.COLOURS[1], BACKUP: figures.COLOURS[2]}
NAMES = [f"{number} {name}" for number, name in enumerate(EXPERTS)]
SMALL = 8  # points


def title(panel: SubFigure, text: str) -> None:
    """The panel's number and name."""
    panel.suptitle(text, fontsize=10, fontweight="bold", x=0.02, ha="left")


def draw_cells(axes: Axes, values: NDArray[np.float64], limit: float, digits: str) -> None:
    """A map of numbers from -limit to limit, each written into its cell."""
    image = axes.imshow(
        values, cmap=figures.MAP_COLOURS, vmin=-limit, vmax=limit, aspect="auto", rasterized=True
    )
    colours = np.asarray(image.to_rgba(values))
    dark = colours[..., :3] @ figures.BRIGHTNESS < 0.5
    for place, value in np.ndenumerate(values):
        row, column = place
        ink = "white" if dark[place] else "black"
        text = f"{value:{digits}}"
        axes.text(column, row, text, ha="center", va="center", fontsize=SMALL, color=ink)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw_bars(axes: Axes, values: Tensor, digits: str | None, *, named: bool) -> None:
    """One bar for each expert, in its colour, with its number where `digits` are given."""
    colours = [COLOURS.get(expert, OTHER) for expert in range(len(values))]
    bars = axes.barh(range(len(values)), values.numpy(), color=colours, height=0.7)
    if digits is not None:
        labels = [f"{value:{digits}}" for value in values.tolist()]
        axes.bar_label(bars, labels, padding=2, fontsize=SMALL)
    axes.axvline(0, color="black", linewidth=0.8)
    bare(axes)
    axes.set_ylim(len(values) - 0.4, -0.6)
    if named:
        axes.set_yticks(range(len(values)), NAMES, fontsize=SMALL)
        axes.tick_params(labelleft=True)
        colour_names(axes)


def colour_names(axes: Axes) -> None:
    """Writes the experts with a colour of their own in it."""
    labels = axes.get_yticklabels()
    for expert, colour in COLOURS.items():
        labels[expert].set(color=colour, fontweight="bold")


def bare(axes: Axes) -> None:
    """Takes away what the numbers next to the bars make superfluous."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelbottom=False, labelleft=False)
    axes.set_xticks([])
