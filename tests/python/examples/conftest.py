"""Trained models, and what the tests of training programs share."""

from __future__ import annotations

from pathlib import Path

import pytest

import train_lm
from lm_runs import run
from small_runs import data, in_the_foreground, same_threads_afterwards, short_report, tiny
from walkthrough import steps
from walkthrough.steps import Story

__all__ = ["data", "in_the_foreground", "same_threads_afterwards", "short_report", "tiny"]


@pytest.fixture(scope="session")
def trained(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The output of a short run, and its folder."""
    out = tmp_path_factory.mktemp("out") / "new" / "folder"
    result = run(*tiny, "--steps", "60", "--checkpoint-every", "20", "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout, out


@pytest.fixture(scope="module")
def story() -> Story:
    return steps.compute()


@pytest.fixture(scope="module")
def tiny_model(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps."""
    out = tmp_path_factory.mktemp("tiny") / "run"
    assert train_lm.main([*tiny, "--steps", "2", "--out", str(out)]) == 0
    return out
