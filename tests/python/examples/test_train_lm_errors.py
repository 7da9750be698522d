"""What the training program says when something goes wrong."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_lm
from lm_runs import fails, run, tensors
from training import checkpoint
from training.job import Job


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data {tmp}/nowhere", "--data: .*/nowhere: no such file or folder"),
        ("--data {tmp}/empty", "--data: .*/empty holds no text"),
        ("--data {tmp}/empty.txt", r"--data: .*/empty\.txt holds no text"),
        ("--data {tmp}/binary", "--data: .*/binary holds no text"),
        ("--data {tmp}/short.txt", "short.txt: --context 128 needs more text than 90 bytes"),
        ("--data {tmp}/short.txt {tmp}/short.txt", "--data must name each path once"),
        ("--out {tmp}/short.txt/out", "--out: cannot write to .*short.txt/out: "),
        ("--load {tmp}/nowhere", "--load: .*/nowhere: no such file"),
        ("--load {tmp}", "--load: .* holds no checkpoint"),
        ("--load {tmp}/short.txt", "--load: .*short.txt is not a safetensors file"),
        ("--config {tmp}/nowhere", "--config: cannot read .*/nowhere"),
    ],
)
def test_refuses(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("x" * 100)
    (tmp_path / "binary").write_bytes(b"\0" * 1000)
    given = arguments.replace("{tmp}", str(tmp_path)).split()
    if "--out" not in given:
        given += ["--out", str(tmp_path / "out")]
    assert re.search(message, fails(capsys, *given))


def test_error_is_one_line_without_traceback() -> None:
    result = run("--top-k", "9")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "train_lm.py: error: --top-k must be at most --experts (8), got 9 "
        "(--help lists the options)\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device: cuda must be there" in fails(capsys, "--device", "cuda")


def test_refuses_to_go_on_without_a_loss(
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole_step = train_lm.optimizer_step

    def spoiled(job: Job, *arguments: object) -> object:
        if job.progress.step == 10:
            torch.nn.init.constant_(job.model.head.weight, float("nan"))
        return whole_step(job, *arguments)

    monkeypatch.setattr(train_lm, "optimizer_step", spoiled)
    options = [*tiny, "--steps", "50", "--checkpoint-every", "4", "--out", str(tmp_path)]
    error = fails(capsys, *options)
    assert "the loss is nan at step 12: --lr must be lower" in error
    # The last checkpoint is from before.
    assert checkpoint.load(tmp_path).progress.step == 8
    assert all(bool(tensor.isfinite().all()) for tensor in tensors(tmp_path).values())


def test_says_that_the_disk_is_too_small_before_it_trains(
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5000))
    error = fails(capsys, *tiny, "--steps", "2", "--out", str(tmp_path))
    assert re.search(r"--out: .* must have \d+ MB free for checkpoints, got 0 MB", error)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_disk_that_fills_up_stops_nothing_but_the_last_save(
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save = checkpoint.save

    def full(folder: Path, *arguments: object) -> Path:
        progress = arguments[3]
        assert isinstance(progress, checkpoint.Progress)
        if progress.step in (4, 8):
            raise checkpoint.CheckpointError("--out: cannot write: No space left on device")
        return save(folder, *arguments)

    monkeypatch.setattr(checkpoint, "save", full)
    options = [*tiny, "--checkpoint-every", "4", "--out", str(tmp_path)]
    assert train_lm.main([*options, "--steps", "10"]) == 0
    warning = "warning: --out: cannot write: No space left on device; the run goes on"
    assert capsys.readouterr().out.count(warning) == 2
    assert checkpoint.load(tmp_path).progress.step == 10
    assert "No space left" in fails(capsys, *options, "--steps", "8")


@pytest.mark.whole_report
def test_a_disk_that_is_full_at_the_report_loses_nothing(
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("training.figures.save", full)
        error = fails(capsys, *tiny, "--steps", "2", "--out", str(tmp_path))
    assert "No space left on device; the run is saved, and --resume reports again" in error
    assert train_lm.main(["--resume", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "results.json").exists()
