"""The story as one picture, drawn without a display.

save() and draw() first, then a function for each panel. panels.py has what they are made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from training import figures
from walkthrough.made_up import EXPERTS, POETRY, SCIENCE, SENTENCE, SENTENCES_AT_ONCE, TOKENS
from walkthrough.panels import (
    BACKUP,
    COLOURS,
    NAMES,
    OTHER,
    SMALL,
    bare,
    colour_names,
    draw_bars,
    draw_cells,
    title,
)
from walkthrough.steps import Story

FEATURES = ("$x_1$", "$x_2$", "$x_3$", "$x_4$")
LEGEND_ABOVE: Mapping[str, Any] = {
    "loc": "lower center",
    "frameon": False,
    "fontsize": SMALL,
    "borderaxespad": 0.1,
    "columnspacing": 1.2,
}


def save(story: Story, path: Path) -> None:
    """Writes the picture as PNG, and as SVG next to it.

    Raises:
        OSError: the folder cannot be written.
    """
    figures.save(draw(story), path.parent, path.stem)


def draw(story: Story) -> Figure:
    """Six panels, in the order of the story."""
    figure = figures.new_figure(figures.WIDTH, 10.6)
    figure.suptitle(f'The life of one gate decision: "{SENTENCE}"', fontsize=12)
    roles = {POETRY: "the first choice", SCIENCE: "the second", BACKUP: "the first's backup"}
    figure.legend(
        handles=[
            Patch(color=COLOURS[expert], label=f"{EXPERTS[expert]}, {role}")
            for expert, role in roles.items()
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    panels: Any = figure.subfigures(3, 2, height_ratios=(1, 1.1, 1.1), wspace=0.03, hspace=0.03)
    draw_tokens(panels[0, 0], story)
    draw_scores(panels[0, 1], story)
    draw_match(panels[1, 0], story)
    draw_gradient(panels[1, 1], story)
    draw_tasks(panels[2, 0], story)
    draw_capacity(panels[2, 1], story)
    return figure


def draw_tokens(panel: SubFigure, story: Story) -> None:
    """The token matrix, its pooling weights next to it, the gate input below."""
    title(panel, "1  Five tokens become one gate input")
    pooling = story.pooling
    cells, weights = panel.subplots(1, 2, width_ratios=(2, 1))
    rows = np.vstack([pooling.tokens.numpy(), pooling.gate_input.numpy()])
    draw_cells(cells, rows, 2.5, ".2f")
    # The gate input is no token: a gap of the background's colour sets it apart.
    cells.axhline(len(TOKENS) - 0.5, color="white", linewidth=6)
    cells.set_yticks(range(len(rows)), [*TOKENS, "gate input x"], fontsize=SMALL)
    cells.get_yticklabels()[-1].set_fontweight("bold")
    cells.set_xticks(range(len(FEATURES)), FEATURES, fontsize=SMALL)
    places = range(len(TOKENS))
    bars = weights.barh(places, pooling.weights.numpy(), color=figures.GREY, height=0.6)
    weights.bar_label(bars, [f"{a:.0%}" for a in pooling.weights.tolist()], padding=2, fontsize=8)
    weights.set_ylim(cells.get_ylim())
    weights.set_xlim(0, 0.45)
    weights.set_title("pooling weight", fontsize=SMALL)
    bare(weights)


def draw_scores(panel: SubFigure, story: Story) -> None:
    """Logits and softmax, with the top 2 marked."""
    title(panel, "2  The gate scores the experts, the top 2 are chosen")
    decision = story.decision
    logits, softmax = panel.subplots(1, 2, sharey=True, width_ratios=(1, 1.2))
    draw_bars(logits, decision.logits, ".2f", named=True)
    draw_bars(softmax, decision.probabilities, ".1%", named=False)
    logits.set_title("logit $z = W_g x + b_g$", fontsize=SMALL)
    softmax.set_title("softmax $p$, and the weight $w$", fontsize=SMALL)
    logits.set_xlim(-2.0, 1.35 * decision.logits.max().item())
    softmax.set_xlim(0, 2.5 * decision.probabilities.max().item())
    for expert, weight in zip(decision.chosen, decision.weights.tolist(), strict=True):
        softmax.text(
            0.98,
            expert,
            f"w = {weight:.2f}",
            transform=softmax.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=9,
            fontweight="bold",
            color=COLOURS[expert],
        )


def draw_match(panel: SubFigure, story: Story) -> None:
    """How well the sentence matches each expert, and the other text."""
    title(panel, "3  How well each expert matches")
    axes = panel.subplots()
    draw_bars(axes, story.decision.match, None, named=True)
    for expert, match in enumerate(story.decision.match.tolist()):
        ink = "white" if expert in COLOURS else "black"  # at the bars' ends the markers may be
        axes.text(1.5, expert, f"{match:.0f}%", va="center", fontsize=SMALL, color=ink)
    axes.plot(
        story.fixed.match.numpy(),
        range(len(EXPERTS)),
        linestyle="none",
        marker="D",
        markersize=5,
        markerfacecolor="white",
        markeredgecolor="black",
        label="another text, with more physics in it",
        zorder=4,
    )
    axes.axvline(50, color=figures.GREY, linewidth=1, linestyle=(0, (2, 2)))
    axes.set_xlim(0, 112)
    axes.tick_params(labelbottom=True)
    axes.set_xticks(range(0, 101, 25), ["0", "25", "50", "75", "100%"], fontsize=SMALL)
    axes.set_xlabel(r"$50\,(1 + \cos(x, w_i))$;  50%: at a right angle", fontsize=SMALL)
    axes.spines["bottom"].set_visible(True)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, frameon=False, fontsize=SMALL
    )


def draw_gradient(panel: SubFigure, story: Story) -> None:
    """The straight-through gradient on W_g, plain and scaled."""
    title(panel, "4  What the gate learns: $dL/dW_g$, in hundredths")
    gradient = story.gradient
    plain, scaled = panel.subplots(1, 2, sharey=True)
    limit = 100 * gradient.plain.abs().max().item()
    for axes, matrix in ((plain, gradient.plain), (scaled, gradient.scaled)):
        draw_cells(axes, 100 * matrix.numpy(), limit, ".1f")
        axes.set_xticks(range(len(FEATURES)), FEATURES, fontsize=SMALL)
        axes.set_yticks(range(len(EXPERTS)), NAMES, fontsize=SMALL)
    colour_names(plain)
    plain.set_title("straight-through", fontsize=SMALL)
    scaled.set_title("times 1 - usage", fontsize=SMALL)
    scaled.tick_params(labelleft=False)
    for expert, usage in enumerate(gradient.usage.tolist()):
        scaled.text(
            1.05,
            expert,
            f"x {1 - usage:.2f}",
            transform=scaled.get_yaxis_transform(),
            va="center",
            fontsize=SMALL,
        )
    plain.set_xlabel("below 0: the step\nraises the logit", fontsize=SMALL)


def draw_tasks(panel: SubFigure, story: Story) -> None:
    """The loss and the favourite's share, task by task."""
    title(panel, f"5  Ten tasks in a row for {EXPERTS[POETRY]}")
    tasks = story.row.tasks
    count = range(1, len(tasks) + 1)
    joined = next(n for n, task in enumerate(tasks, 1) if BACKUP in task.served_by)
    loss, share = panel.subplots(2, 1, sharex=True, height_ratios=(1, 1.3))
    lines: list[tuple[Axes, str, list[float], str]] = [
        (loss, r"loss $N\,\Sigma\,f\,P$", [task.loss for task in tasks], "black"),
        (loss, f"{EXPERTS[POETRY]}'s term", [task.part for task in tasks], COLOURS[POETRY]),
        (share, "1 - usage", [1 - task.usage[POETRY].item() for task in tasks], "black"),
        (share, r"weight $w$", [task.weight for task in tasks], figures.COLOURS[3]),
        (
            share,
            "probability $p$",
            [task.probabilities[POETRY].item() for task in tasks],
            COLOURS[POETRY],
        ),
    ]
    for place, (axes, name, values, colour) in enumerate(lines):
        axes.plot(
            count,
            values,
            color=colour,
            linewidth=1.6,
            marker=figures.MARKERS[place],
            markersize=4,
            label=name,
        )
    for axes in (loss, share):
        axes.axvspan(joined - 0.5, len(tasks) + 0.5, color=COLOURS[BACKUP], alpha=0.15, lw=0)
        axes.set_xlim(0.5, len(tasks) + 0.5)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=SMALL)
        axes.legend(bbox_to_anchor=(0.5, 1), ncols=3, handlelength=1.8, **LEGEND_ABOVE)
    loss.set_ylim(0, 2.4)
    loss.text(
        joined - 0.35,
        0.1,
        f"{EXPERTS[BACKUP]}, the backup,\nis at work, too",
        color=COLOURS[BACKUP],
        fontsize=SMALL,
        fontweight="bold",
    )
    share.set_ylim(0.35, 0.95)
    share.set_xticks(count)
    share.set_xlabel("task", fontsize=SMALL)


def draw_capacity(panel: SubFigure, story: Story) -> None:
    """The room of each expert, what is kept of a batch and what is refused."""
    room = story.room
    title(panel, f"6  Room for {SENTENCES_AT_ONCE} such sentences at once")
    axes = panel.subplots()
    for expert in range(len(EXPERTS)):
        colour = COLOURS.get(expert, OTHER)
        wanted = int((room.wanted == expert).sum())
        kept = int((room.served == expert).sum())
        axes.barh(expert, room.capacity[expert].item(), 0.8, color="white", edgecolor="black")
        axes.barh(expert, kept, 0.55, color=colour)
        if wanted > kept:
            axes.barh(
                expert,
                wanted - kept,
                0.55,
                left=kept,
                color="white",
                edgecolor=colour,
                hatch="/////",
                linewidth=1,
            )
        axes.text(
            max(wanted, int(room.capacity[expert])) + 0.2,
            expert,
            f"factor {room.factor[expert]:.2f}",
            va="center",
            fontsize=SMALL,
        )
    even: dict[str, Any] = {"color": figures.GREY, "linewidth": 1, "linestyle": (0, (2, 2))}
    axes.axvline(room.even, **even)
    axes.set_yticks(range(len(EXPERTS)), NAMES, fontsize=SMALL)
    axes.invert_yaxis()
    colour_names(axes)
    axes.set_xlim(0, SENTENCES_AT_ONCE + 2.6)
    axes.set_xticks(range(0, SENTENCES_AT_ONCE + 1, 2))
    axes.set_xlabel("slots;  factor = max(1, load / mean load)", fontsize=SMALL)
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        handles=[
            Patch(facecolor="white", edgecolor="black", label="room"),
            Patch(facecolor=figures.GREY, label="kept"),
            Patch(facecolor="white", edgecolor=figures.GREY, hatch="/////", label="refused"),
            Line2D([], [], label="if all had the same", **even),
        ],
        bbox_to_anchor=(0.45, 1),
        ncols=4,
        **LEGEND_ABOVE,
    )
