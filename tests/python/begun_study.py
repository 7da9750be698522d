"""A study in a process of its own, to be stopped or killed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def begun(study: str, options: list[str], run: re.Pattern[str]) -> subprocess.Popen[str]:
    """The process, once it has printed the line of a run that is over."""
    child = subprocess.Popen(
        [sys.executable, "-m", f"studies.{study}", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if run.match(line):
            break
    return child
