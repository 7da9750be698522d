"""What the programs of all studies have in common: an option, and how they end."""

from __future__ import annotations

import sys
from collections.abc import Callable

from training.arguments import Parser, number

# What is left of a study whose runs have checkpoints, and of one that writes at its end.
RESUMABLE = "the same command goes on from here"
NOTHING = "nothing was written"


def add_seeds(parser: Parser, default: int, what: str = "of each") -> None:
    """Adds the option that says how many runs there are `what`."""
    parser.add_argument(
        "--seeds",
        type=number(int, 1, 100),
        default=default,
        metavar="N",
        help=f"{what} (default {default})",
    )


def exit_status(
    parser: Parser, work: Callable[[], None], errors: tuple[type[Exception], ...], left: str
) -> int:
    """Works, and turns what the user can mend, which is `errors`, into one line.

    Args:
        parser: of the command line.
        work: what the command is for.
        errors: those whose text is for the user.
        left: what there is after Ctrl-C, in words.
    """
    try:
        work()
    except errors as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(f"\ninterrupted; {left}", file=sys.stderr)
        return 130
    return 0
