"""How a check that takes long says so: plain lines on standard error."""

from __future__ import annotations

import sys
import time

# Seconds that a check may take without a line, and between two lines.
_SHORT, _BETWEEN = 2.0, 5.0


class ProgressLines:
    """Says how long a check will take, if that is more than two seconds, and how far it is.

    Args:
        owner: starts each line.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._began = self._last = time.perf_counter()
        self._announced = False

    def __call__(self, done: int, total: int, seconds: float) -> None:
        """Takes note that `done` of `total` steps, which take `seconds` in all, are done."""
        now = time.perf_counter()
        if not self._announced and max(seconds, now - self._began) > _SHORT:
            self._announced = True
            self.say(f"about {seconds:.0f} s for {total} steps")
            self._last = now
        elif self._announced and 0 < done < total and now - self._last > _BETWEEN:
            left = (now - self._began) / done * (total - done)
            self.say(f"{done} of {total} steps, about {left:.0f} s left")
            self._last = now

    def say(self, text: str) -> None:
        """One line, which the owner starts."""
        print(f"{self._owner}: {text}", file=sys.stderr, flush=True)
