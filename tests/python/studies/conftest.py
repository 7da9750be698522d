"""What the tests of training programs share."""

from __future__ import annotations

from small_runs import data, in_the_foreground, same_threads_afterwards, short_report, tiny

__all__ = ["data", "in_the_foreground", "same_threads_afterwards", "short_report", "tiny"]
