"""What a study found: printed as it is, and kept as Markdown with what computed it."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import markdown
from benchmarks.machine import processor
from training import figures, run_folder
from training.run_folder import RunFolder
from training.terminal import command_line


class Result:
    """Sentences and tables in their order."""

    def __init__(self, width: int | None = None) -> None:
        """Starts empty; tables are printed in `width` columns, or as many as the terminal has."""
        self.console = Console(highlight=False, width=width)
        self.parts: list[str] = []

    def say(self, text: str) -> None:
        """Prints a paragraph."""
        print(text)
        self.parts.append(text.strip())

    def say_each(self, sentences: Sequence[str]) -> None:
        """Prints sentences, each on a line of its own."""
        print("\n".join(sentences))
        self.parts.append("\n".join(f"- {sentence}" for sentence in sentences))

    def show(self, table: Table) -> None:
        """Prints a table whose first column holds names and whose others hold numbers."""
        self.console.print(table)
        header = [cell_text(column.header) for column in table.columns]
        columns = [[cell_text(cell) for cell in column.cells] for column in table.columns]
        self.parts.append(markdown.table(header, list(zip(*columns, strict=True))))

    def save(self, figure: Figure, content: Mapping[str, Any], folder: Path, name: str) -> None:
        """Writes NAME.png, NAME.svg, NAME.json and NAME.md, and says where.

        Args:
            figure: of the study.
            content: the numbers, ready for JSON.
            folder: where they go.
            name: of the files.

        Raises:
            FolderError: they cannot be written.
        """
        versions = {**run_folder.versions(), "processor": processor()}
        about = (
            f"Written by `{command_line()}` at revision {versions['git_revision']}, the library "
            f"built from {versions['torchmoe']['git_revision']}, with torch {torch.__version__} "
            f"and Python {platform.python_version()} on {run_folder.cores()} cores of "
            f"{versions['processor']} ({torch.backends.cpu.get_cpu_capability()})."
        )
        try:
            for path in figures.save(figure, folder, name):
                print(f"figure: {path}")
            page = "\n\n".join([about, *self.parts]) + "\n"
            run_folder.write(folder / f"{name}.md", [page.encode()])
        except OSError as error:
            raise RunFolder(folder).unwritable(error) from error
        run_folder.write_json(folder / f"{name}.json", {**content, **versions})
        print(f"tables: {folder / name}.md, numbers: {folder / name}.json")


def make_table(*titles: str) -> Table:
    """A table whose first column holds names and the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place, title in enumerate(titles):
        table.add_column(title, justify="right" if place else "left", no_wrap=True)
    return table


def cell_text(cell: object) -> str:
    """A cell as Markdown has it."""
    return str(cell).strip().replace("|", r"\|")
