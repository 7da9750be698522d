"""What the tests of training programs share."""

from __future__ import annotations

import pytest

from small_runs import data, in_the_foreground, same_threads_afterwards, short_report, tiny
from studies.common import program, study

__all__ = ["data", "in_the_foreground", "same_threads_afterwards", "short_report", "tiny"]


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the timed steps short where other work has the cores."""
    for module in (program, study):
        monkeypatch.setattr(module, "cores", lambda: 1)
