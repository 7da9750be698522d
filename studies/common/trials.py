"""Many short runs in one process, one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn

from studies.common.program import add_seeds
from training.arguments import Parser, number

Run = TypeVar("Run")


def add_options(parser: Parser, steps: int, seeds: int, lr: float, out: str) -> None:
    """Adds the options that every study of many short runs has, with its defaults."""
    parser.add_argument(
        "--steps",
        type=number(int, 1, 10**6),
        default=steps,
        metavar="N",
        help=f"optimizer steps of each run (default {steps})",
    )
    add_seeds(parser, seeds, "runs of each kind")
    parser.add_argument(
        "--lr",
        type=number(float, 1e-9, 10.0),
        default=lr,
        metavar="X",
        help=f"largest learning rate of Adam (default {lr})",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(out),
        metavar="FOLDER",
        help=f"where the figure and the numbers go (default {out})",
    )


def train_all(
    names: Sequence[str],
    seeds: int,
    steps: int,
    train: Callable[[str, int, Callable[[], None]], Run],
    describe: Callable[[str, int, Run], str],
) -> dict[str, list[Run]]:
    """All runs by name, seed by seed, with a bar on a terminal and a line for each.

    Args:
        names: what is trained.
        seeds: runs of each.
        steps: of each run.
        train: the run of a name and a seed; it calls its last argument after each step.
        describe: what a run's line says, before its time.
    """
    runs: dict[str, list[Run]] = {name: [] for name in names}
    console = Console(highlight=False)
    count = len(names) * seeds
    print(f"{count} {'runs' if count > 1 else 'run'} of {steps} steps, and what each ends with:")
    with Progress(
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        bar = progress.add_task("", total=count * steps)
        for seed in range(seeds):
            for name in names:
                start = time.perf_counter()
                run = train(name, seed, partial(progress.advance, bar))
                runs[name].append(run)
                seconds = time.perf_counter() - start
                console.print(f"  {describe(name, seed, run)}  {seconds:5.1f} s")
    return runs
