"""What the ways of balancing did: a table, what it says, and the figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
from rich import box
from rich.table import Table

from studies.balance.experiment import BOUND, CONTROL, HEALTHY, METHODS, Run
from studies.common.result import Result
from training import figures
from training.figures import Values

SHOWN_LOSS = 1.3
LOSS_TICKS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3, 5, 10)
BOUND_LOOK: Mapping[str, Any] = {"color": "black", "linewidth": 0.8, "zorder": 3}


def report(folder: Path, about: str, runs: Mapping[str, Sequence[Run]], lr: float) -> None:
    """Prints the table and what it says, draws the figure, writes the numbers."""
    results = {name: summary(name, runs) for name in runs}
    result = Result()
    show_table(result, results)
    result.say_each(verdict(results))
    steps = runs[CONTROL][0].steps.astype(int).tolist()
    content = {
        "about": " ".join(about.split()),
        "unit": "one number, or one curve, per seed in each list",
        "learning_rate": lr,
        "steps": steps[-1],
        "steps_at_records": steps,
        "results": {
            name: {
                "arguments": {key: repr(value) for key, value in METHODS[name].arguments.items()},
                "starts_collapsed": METHODS[name].starts_collapsed,
                **results[name],
                "curves": {
                    "max_violation": [rounded(run.violation) for run in some],
                    "task_loss": [rounded(run.loss) for run in some],
                },
            }
            for name, some in runs.items()
        },
    }
    result.save(draw(runs), content, folder, "balance")


def summary(name: str, runs: Mapping[str, Sequence[Run]]) -> dict[str, list[Any]]:
    """What the table shows of a method, one entry for each seed."""
    pairs = list(zip(runs[name], runs[CONTROL], strict=True))
    return {
        "recovered_after_steps": [run.recovery(control) for run, control in pairs],
        "max_violation": [run.at_end(run.violation) for run, _ in pairs],
        "dead_experts": [run.at_end(run.dead) for run, _ in pairs],
        "rerouted_share": [run.at_end(run.rerouted) for run, _ in pairs],
        "task_loss": [run.at_end(run.loss) for run, _ in pairs],
    }


def show_table(result: Result, results: Mapping[str, Mapping[str, list[Any]]]) -> None:
    """A row for each method: means over the seeds and, where they differ, ranges."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)  # fits into 80 columns
    table.add_column("method", no_wrap=True)
    for title in ("steps", "range", "MaxVio", "range", "dead", "loss", "range"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, found in results.items():
        violation, loss = found["max_violation"], found["task_loss"]
        table.add_row(
            name,
            *recovery_cells(name, found["recovered_after_steps"]),
            f"{fmean(violation):.2f}",
            ends(violation, ".2f"),
            f"{fmean(found['dead_experts']):.1f}",
            f"{fmean(loss):.2f}",
            ends(loss, ".2f"),
        )
    seeds = len(results[CONTROL]["task_loss"])
    result.say(
        f"\nsteps: after so many it has recovered: MaxVio stays below {BOUND:g}, and the loss ends"
        f"\nbelow the {CONTROL}'s; the rest: means of the last tenth of the steps, "
        f"{seeds} seed{'s' * (seeds > 1)}"
    )
    result.show(table)


def recovery_cells(name: str, steps: Sequence[int | None]) -> tuple[str, str]:
    """Mean and range of the steps where all seeds recovered, else how many did."""
    if not METHODS[name].starts_collapsed:
        return "", ""
    found = [one for one in steps if one is not None]
    if len(found) == len(steps):
        return f"{fmean(found):.0f}", ends(found, "d")
    return (f"{len(found)} of {len(steps)}" if found else "no"), ""


def ends(values: Sequence[float], digits: str) -> str:
    """Least and largest, where there is more than one."""
    return f"{min(values):{digits}}-{max(values):{digits}}" if len(values) > 1 else ""


def verdict(results: Mapping[str, Mapping[str, list[Any]]]) -> list[str]:
    """Which methods recover and which do not, and what those that reroute still move."""
    counts = {
        name: sum(one is not None for one in result["recovered_after_steps"])
        for name, result in results.items()
        if METHODS[name].starts_collapsed
    }
    seeds = len(results[CONTROL]["task_loss"])
    groups = {
        "recovered": [name for name, count in counts.items() if count == seeds],
        "recovered with some seeds": [name for name, n in counts.items() if 0 < n < seeds],
        "not recovered": [name for name, count in counts.items() if count == 0],
    }
    sentences = [f"{title}: {', '.join(names)}" for title, names in groups.items() if names]
    for name, result in results.items():
        if any(result["rerouted_share"]):
            share = fmean(result["rerouted_share"])
            sentences.append(f"{name}: {share:.0%} of the slots are still rerouted at the end")
    return sentences


def rounded(values: Values) -> list[float]:
    """Four digits, enough for a curve."""
    return [float(f"{value:.4g}") for value in values]


def draw(runs: Mapping[str, Sequence[Run]]) -> Figure:
    """MaxVio and task loss by steps."""
    figure = figures.new_figure(figures.WIDTH, 4.8)
    left, right = figure.subplots(1, 2)
    looks = looks_of(list(runs))
    for name, some in runs.items():
        draw_lines(left, some, [run.violation for run in some], looks[name])
        draw_lines(right, some, [run.loss for run in some], looks[name])
    left.axhline(BOUND, **BOUND_LOOK)
    left.set_ylabel("MaxVio")
    right.set_ylabel("task loss")
    right.set_yscale("log")
    for axes in (left, right):
        figures.set_loss_axes(axes)
        axes.set_xlabel("optimizer steps")
    left.set_ylim(bottom=0)
    # The common function, which all learn alike at the start, would flatten the rest.
    lowest = min(run.loss.min() for some in runs.values() for run in some)
    right.set_ylim(0.95 * lowest, max(SHOWN_LOSS, 1.2 * lowest))
    right.yaxis.set_major_locator(FixedLocator(LOSS_TICKS))
    right.yaxis.set_minor_locator(NullLocator())
    right.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))

    seeds = len(runs[CONTROL])
    about = f"line: mean of {seeds} seeds    band: their range"
    handles = [Line2D([], [], label=name, **look) for name, look in looks.items()]
    handles.append(Line2D([], [], label=f"recovered: below {BOUND:g}", **BOUND_LOOK))
    figures.add_legend(figure, handles, about if seeds > 1 else "one seed")
    return figure


def looks_of(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each method's line is drawn: a colour for a family, none for what is there to compare."""
    looks = {
        CONTROL: {"color": "black", "linestyle": "-", "linewidth": 2},
        HEALTHY: {"color": "black", "linestyle": (0, (1, 1)), "linewidth": 1.2},
    }
    families: dict[str, list[str]] = {}
    for name in METHODS:
        if name not in looks:
            families.setdefault(name.partition(":")[0], []).append(name)
    for colour, family in enumerate(families.values()):
        for place, name in enumerate(family):
            dashes = figures.line_look(colour + place)["linestyle"]
            looks[name] = {**figures.line_look(colour), "linestyle": dashes}
    return {name: looks[name] for name in names}


def draw_lines(
    axes: Axes, runs: Sequence[Run], values: Sequence[Values], look: Mapping[str, Any]
) -> None:
    """The mean over the seeds, and a band from the least to the largest."""
    steps, stacked = runs[0].steps, np.array(values)  # [N], [S, N]
    single = "." if len(steps) == 1 else ""  # one point alone makes no line
    axes.plot(steps, stacked.mean(axis=0), marker=single, **look)
    low, high = stacked.min(axis=0), stacked.max(axis=0)
    axes.fill_between(steps, low, high, color=look["color"], alpha=0.12, linewidth=0)
