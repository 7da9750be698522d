"""The training program is stopped, and goes on."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import train_lm
from lm_runs import assert_same, fails, held_out
from training import checkpoint
from training.job import Job
from training.metrics import Record


def stop_at(step: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets somebody press Ctrl-C, or the system ask to stop, in the middle of a step."""
    whole_step = train_lm.optimizer_step

    def interrupted(job: Job, *arguments: object) -> object:
        if job.progress.step + 1 == step:
            signal.raise_signal(number)
        return whole_step(job, *arguments)

    monkeypatch.setattr(train_lm, "optimizer_step", interrupted)


@pytest.mark.skipif(os.name == "nt", reason="signals as POSIX has them")
@pytest.mark.parametrize(
    ("options", "number"),
    [
        ("", signal.SIGINT),
        ("--capacity-factor 1 --order token", signal.SIGTERM),
        ("--capacity-factor 1 --overflow next_best --balance bias", signal.SIGINT),
        ("--estimator straight_through --top-k 1", signal.SIGINT),
        ("--estimator straight_through_dense --normalize uniform", signal.SIGINT),
        ("--estimator default_vector", signal.SIGINT),
        ("--estimator sparsemixer", signal.SIGTERM),
        ("--estimator gumbel_straight_through", signal.SIGINT),
        ("--feed-forward dense", signal.SIGINT),
        ("--dtype float64", signal.SIGHUP),
        ("--dtype bfloat16", signal.SIGINT),
        ("--seed 5 --experts 3 --context 17", signal.SIGTERM),
    ],
)
def test_resumes_to_the_bit(
    options: str,
    number: signal.Signals,
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [*tiny, *options.split(), "--steps", "20", "--checkpoint-every", "7"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train_lm.main([*command, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        stop_at(11, number, patch)
        assert train_lm.main([*command, "--out", str(broken)]) == 130
    printed = capsys.readouterr().out
    assert f"interrupted after 11 steps; to go on, run with: --resume --out {broken}" in printed
    assert checkpoint.load(broken).progress.step == 11
    assert not (broken / "results.json").exists()
    assert train_lm.main(["--resume", "--out", str(broken), "--threads", "1"]) == 0
    assert "step-00000011" in capsys.readouterr().out
    assert_same(whole, broken)
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, broken)]
    assert results[0]["bits_per_byte"] == results[1]["bits_per_byte"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_is_ignored_stays_ignored(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """As SIGHUP under nohup, and Ctrl-C in a script's background job."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        stop_at(3, number, monkeypatch)
        assert train_lm.main([*tiny, "--steps", "5", "--out", str(tmp_path)]) == 0
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_trains_in_a_thread(tiny: list[str], tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        end = pool.submit(train_lm.main, [*tiny, "--steps", "2", "--out", str(tmp_path)])
        assert end.result() == 0


def test_ctrl_c_twice_stops_at_once(
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def twice(*_: object) -> None:
        # Each is handled before the next, as os.kill does not promise in a process with threads.
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train_lm, "optimizer_step", twice)
    monkeypatch.setattr("training.terminal.ONE_PRESS", 0.0)
    before = signal.getsignal(signal.SIGINT)
    assert train_lm.main([*tiny, "--steps", "20", "--out", str(tmp_path)]) == 130
    assert "interrupted; what the last checkpoint holds is saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_an_output_that_goes_away_loses_no_step(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []

    def show(_display: object, record: Record, _share: float) -> None:
        shown.append(record.step)
        if len(shown) == 3:
            raise BrokenPipeError

    monkeypatch.setattr("training.display.PlainDisplay.show", show)
    with pytest.raises(BrokenPipeError):
        train_lm.main([*tiny, "--steps", "50", "--out", str(tmp_path)])
    assert checkpoint.load(tmp_path).progress.step == shown[-1] > 0


def test_resume_of_a_finished_run_does_nothing(
    trained: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = trained[1]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert train_lm.main(["--resume", "--out", str(out)]) == 0
    assert "this run is over, after 60 steps" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_resume_of_a_run_killed_in_its_report_reports(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_lm.main([*tiny, "--steps", "3", "--out", str(tmp_path)]) == 0
    (tmp_path / "results.json").unlink()
    capsys.readouterr()
    assert train_lm.main(["--resume", "--out", str(tmp_path)]) == 0
    assert list(held_out(capsys.readouterr().out)) == ["notes", "sums.txt", "mean"]
    assert (tmp_path / "results.json").exists()


def test_resume_without_a_checkpoint_starts_from_the_beginning(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_lm.main([*tiny, "--steps", "3", "--resume", "--out", str(tmp_path)]) == 0
    assert f"{tmp_path} holds no checkpoint to resume from" in capsys.readouterr().out
    assert checkpoint.load(tmp_path).progress.step == 3


def test_resume_refuses_another_text(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text("one and two and three and four\n" * 100)
    options = [*tiny, "--data", str(text), "--out", str(tmp_path / "out")]
    assert train_lm.main([*options, "--steps", "2"]) == 0
    text.write_text("one and two and three and five\n" * 100)
    error = fails(capsys, "--resume", "--out", str(tmp_path / "out"))
    assert "--resume: the text is not the one that" in error


def test_resume_refuses_other_settings(
    trained: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(trained[1])
    error = fails(capsys, "--resume", "--out", out, "--lr", "0.1")
    assert "--lr is 0.003 in the run to resume and cannot change, got 0.1" in error
    assert train_lm.main(["--resume", "--out", out, "--lr", "0.003", "--threads", "2"]) == 0
