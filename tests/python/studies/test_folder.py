"""A study writes neither where another run does nor where there is no folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from refused import refused
from studies.balance import program as balance
from studies.classification import program as classification
from studies.common import outcome
from studies.routing_cache import program as routing_cache
from training import run_folder
from training.corpus import Text
from training.run_folder import FolderError
from training.settings import Settings


@pytest.mark.parametrize("program", [balance, classification, routing_cache])
def test_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], program: object) -> None:
    with run_folder.locked(tmp_path):
        error = refused(capsys, program.main, "--out", str(tmp_path)).err
    assert "is in use by process" in error


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (balance, "balance"),
        (classification, "classification"),
        (routing_cache, "routing_cache"),
    ],
)
def test_refuses_a_folder_that_is_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], program: object, name: str
) -> None:
    (tmp_path / "file").write_text("mine")
    output = refused(capsys, program.main, "--out", str(tmp_path / "file"))
    assert re.fullmatch(
        rf"python -m studies.{name}: error: --out: cannot write to .*file: .*\n", output.err
    )
    assert output.out == ""  # before there is work
    assert (tmp_path / "file").read_text() == "mine"


def test_the_runs_of_a_comparison(data: list[str], tmp_path: Path) -> None:
    settings = Settings(data=tuple(data), out=str(tmp_path), steps=2)
    with run_folder.locked(tmp_path), pytest.raises(FolderError, match="is in use by process"):
        outcome.trained(settings, Text.load(data))
