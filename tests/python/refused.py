"""What a program says when it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def refused(
    capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], object], *arguments: str
) -> pytest.CaptureResult[str]:
    """What the program printed, of which one line says why it refuses; inside this process."""
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    return printed
