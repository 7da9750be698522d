"""What every program's command line is made of, whatever its options are."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """A parser of whole numbers (int) or numbers (float) from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {name} from {low} to {high}, got {text!r}")
        return value

    return parse


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line; --help keeps the lines of its texts."""

    def __init__(
        self, prog: str, about: str | None, examples: str, argument_default: object = None
    ) -> None:
        """Takes how the program is called, what it does, and examples of its command line."""
        super().__init__(
            prog=prog,
            description=about,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argument_default,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Says what is wrong and exits with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")
