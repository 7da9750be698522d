"""Trains in child processes that are killed, each resuming the one before, until the run is over.

    python killed_run.py KILLS OPTION...     at random moments
    python killed_run.py points OPTION...    at each file operation of a save, one after the other

Prints how many children were killed. The children are forked before torch has started a thread.
"""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))

# Imported here once instead of in each child, whose short life would end before its first step.
import torch._dynamo  # what the optimizer imports
import torch.utils.tensorboard  # noqa: F401

import train_lm

LONGEST_LIFE = 0.4  # seconds
# Of one save: open, half of a write, the rest of it, fsync, rename, fsync of the folder, unlink.
OPERATIONS_OF_A_SAVE = 7


def live(options: list[str], before: Callable[[], None]) -> int:
    """Starts a child; gives its process number."""
    child = os.fork()
    if child == 0:
        before()
        sys.stdout = io.StringIO()
        os._exit(train_lm.main([*options, "--resume"]))
    return child


def ended_well(child: int) -> bool:
    """Waits for a child: True if its run is over, False if it was killed."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    if os.WEXITSTATUS(status) != 0:
        sys.exit(f"a run ended with status {os.WEXITSTATUS(status)}")
    return True


def die_at(number: int) -> None:
    """Lets this process kill itself just before its file operation of that number."""
    left = [number]

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            count()
            return operation(*arguments, **keywords)

        return call

    class CountedFile(io.FileIO):
        """A file that is written in two halves."""

        def write(self, data: Any) -> int:
            half = len(data) // 2
            count()
            super().write(data[:half])
            count()
            super().write(data[half:])
            return len(data)

    opened = Path.open

    def open_counted(path: Path, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        if mode != "wb":
            return opened(path, mode, *arguments, **keywords)
        count()
        return CountedFile(path, mode)

    Path.open = open_counted  # type: ignore[method-assign]
    os.fsync = counted(os.fsync)
    os.replace = counted(os.replace)
    Path.unlink = counted(Path.unlink)  # type: ignore[method-assign]


def main() -> None:
    """See above."""
    options = sys.argv[2:]
    killed = 0
    if sys.argv[1] == "points":
        # The first saves of a run come after some operations on other files; three saves' worth of
        # points meets each operation of a save at least once, removing an old one included.
        for point in range(1, 4 * OPERATIONS_OF_A_SAVE):
            if ended_well(live(options, lambda point=point: die_at(point))):  # type: ignore[misc]
                break
            killed += 1
    else:
        draw = random.Random(0)
        while killed < int(sys.argv[1]):
            child = live(options, lambda: None)
            time.sleep(draw.uniform(0, LONGEST_LIFE))
            os.kill(child, signal.SIGKILL)
            if ended_well(child):
                break
            killed += 1
    if not ended_well(live(options, lambda: None)):
        sys.exit("the last child was killed")
    print(killed)


if __name__ == "__main__":
    main()
