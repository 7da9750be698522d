"""Many short runs in one process: their folder, the runs one after another, and what is left."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn

from lm import figures, run_folder
from lm.run_folder import RunFolder

Run = TypeVar("Run")


def make_folder(path: Path) -> Path:
    """Makes the folder and proves that files can be written there, before there is work."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise RunFolder(path).unwritable(error) from error
    return path


@contextmanager
def taken_folder(path: Path) -> Iterator[Path]:
    """The folder, made and kept from other runs while the block runs."""
    with run_folder.locked(make_folder(path)):
        yield path


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


def save(figure: Figure, content: Mapping[str, Any], folder: Path, name: str) -> None:
    """Writes the figure and the numbers, with the versions of what computed them."""
    try:
        for path in figures.save(figure, folder, name):
            print(f"figure: {path}")
    except OSError as error:
        raise RunFolder(folder).unwritable(error) from error
    run_folder.write_json(folder / f"{name}.json", {**content, **run_folder.versions()})
