"""What the programs of studies have in common: options, and how they end."""

from __future__ import annotations

import sys
from collections.abc import Callable

from training.arguments import Parser, number
from training.run_folder import cores

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


def add_jobs(parser: Parser) -> None:
    """Adds the option that says how many runs there are at a time."""
    parser.add_argument(
        "--jobs",
        type=number(int, 1, 4096),
        metavar="N",
        help="runs at a time, each on --threads of its own (default as many as the cores can)",
    )


def jobs_at_a_time(given: int | None, threads: int) -> int:
    """As many as were given, or as the cores can where each has so many threads, 0 for all."""
    return given or max(1, cores() // (threads or cores()))


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
