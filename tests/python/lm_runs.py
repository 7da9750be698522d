"""Runs of the training program, and what they leave."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train_lm
from refused import refused
from training import checkpoint

SCRIPT = train_lm.__file__
LINE = re.compile(
    r"^ *(\d+)  +([\d.]+)  +(\d+)  +([\d.]+)  +([\d.]+)%  +([\d.]+)%  +([\d.]+)  +(\d+)  +"
    r"(\d+:\d\d)$",
    re.MULTILINE,
)
ROW = re.compile(r"^ *(\S+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) *$", re.MULTILINE)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script as a user starts it."""
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr with which the program refuses."""
    error = refused(capsys, train_lm.main, *arguments).err
    assert error.startswith("train_lm.py: error: ")
    return error


def tensors(folder: Path) -> dict[str, Tensor]:
    """All that the newest checkpoint of a run holds."""
    return checkpoint.load(folder).tensors


def assert_same(a: Path, b: Path) -> None:
    """Two runs ended with the same bits, the optimizer's included."""
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def held_out(output: str) -> dict[str, list[float]]:
    """Rows of the table at the end: this model, then orders 5, 4 and 3."""
    return {row[0]: [float(value) for value in row[1:]] for row in ROW.findall(output)}
