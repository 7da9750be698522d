"""How the walkthrough prints titles, tables and vectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

LEAST_WIDTH = 80  # columns


def heading(number: int, text: str) -> None:
    """The title of a step."""
    print(f"\n{number}. {text}\n{'-' * (len(text) + len(str(number)) + 2)}")


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Names on the left, numbers on the right, within 80 columns."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place, title in enumerate(titles):
        left = place == 0 or not title
        shown.add_column(title, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    print_table(shown)


def print_table(shown: Table) -> None:
    """Prints it as wide as the terminal, but not so narrow that numbers would be cut."""
    width = max(LEAST_WIDTH, Console().width)
    Console(highlight=False, markup=False, width=width).print(shown)


def numbers(values: Iterable[float] | Tensor, digits: int) -> list[str]:
    """Each with so many digits."""
    return [f"{float(value):.{digits}f}" for value in values]


def row_of(values: Iterable[float] | Tensor, digits: int = 4) -> str:
    """A vector on one line."""
    return f"[{', '.join(numbers(values, digits))}]"


def slots_of(indices: Tensor) -> str:
    """The experts of each sentence's slots, sentence by sentence."""
    return "  ".join(" ".join(f"{expert:2d}" for expert in row) for row in indices.tolist())


def span(sentences: Sequence[int]) -> str:
    """Neighbours from the first to the last."""
    return f"{sentences[0]} to {sentences[-1]}" if len(sentences) > 1 else str(sentences[0])
