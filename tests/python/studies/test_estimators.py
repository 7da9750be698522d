"""The comparison of estimators: what it trains, what its numbers say, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from begun_study import begun
from refused import refused
from studies.common import pool, study
from studies.estimators import program
from studies.estimators.program import STUDY
from torchmoe.nn import known_estimators
from training.settings import Settings, SettingsError

RUN = re.compile(r"^  (\w+-seed\d-steps\d+) +held-out ([\d.]+) ", re.MULTILINE)
OTHER = "straight_through"
NAMES = [f"{name}-seed{seed}-steps24" for seed in (0, 1) for name in ("exact", OTHER)]
SHORT = ("--steps", "24", "--checkpoint-every", "8", "--seeds", "2", "--estimators", OTHER)


pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("estimators")


# ---- the program


@pytest.mark.study
def test_stops(tiny: list[str], folder: Path) -> None:
    options = [*tiny, *SHORT, "--jobs", "1", "--out", str(folder)]
    child = begun("estimators", options, RUN)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    _, error = child.communicate(timeout=60)
    assert child.returncode == 130
    assert error == "\ninterrupted; the same command goes on from here\n"
    assert not (folder / "estimators.json").exists()
    assert 1 <= len(list(folder.iterdir())) < len(NAMES)


@pytest.mark.study
def test_goes_on_and_compares(
    tiny: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = folder / NAMES[0] / "log.txt"
    before = log.read_text()
    assert "tokens/s" in before
    assert program.main([*tiny, *SHORT, "--jobs", "2", "--out", str(folder)]) == 0
    assert "tokens/s" not in log.read_text().removeprefix(before)  # not trained again

    output = capsys.readouterr().out
    runs = dict(RUN.findall(output))
    assert sorted(runs) == sorted(NAMES)
    report = json.loads((folder / "estimators.json").read_text())
    results = report["results"]
    assert list(results) == ["exact", OTHER]
    for name, result in results.items():
        printed = [float(runs[f"{name}-seed{seed}-steps24"]) for seed in (0, 1)]
        assert result["final_held_out"] == pytest.approx(printed, abs=1e-4)
        assert result["steps"] == [8, 16, 24]
        assert [len(losses) for losses in result["held_out"]] == [3, 3]
        assert 0 < result["step_seconds"] < 10
    difference = np.subtract(results[OTHER]["final_held_out"], results["exact"]["final_held_out"])
    assert difference.any()  # the estimators were not the same
    assert results[OTHER]["final_difference"]["mean"] == pytest.approx(difference.mean())
    assert f" {difference.mean():+.4f} " in output
    assert results["exact"]["final_difference"] is None
    ends = [24 * result["step_seconds"] for result in results.values()]
    assert report["equal_time_seconds"] == min(ends)
    assert str(folder) not in json.dumps(report)
    assert report["settings"]["data"] == ["notes", "sums.txt"]
    assert (folder / "estimators.png").stat().st_size > 10_000
    assert output.count("no estimator beats exact") + output.count("beats exact by") >= 2


@pytest.mark.study
def test_a_failed_run_ends_it(
    tiny: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*tiny, *SHORT, "--jobs", "1", "--out", str(folder)]
    error = refused(capsys, program.main, *options, "--lr", "0.1").err
    assert error.startswith(
        "python -m studies.estimators: error: "
        "exact-seed0-steps24: --lr is 0.003 in the run to resume"
    )


@pytest.mark.parametrize(
    "option",
    [
        *("--estimator exact", "--seed 3", "--minutes 1", "--load x", "--resume", "--steps 0"),
        *("--estimators magic", "--estimators exact:l2"),
        *("--feed-forward dense", "--estimators exact", "--data nowhere", "--seeds 0", "--jobs 0"),
    ],
)
def test_refuses(
    option: str, tiny: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, program.main, *tiny, *option.split(), "--out", str(folder)).err
    name = "python -m studies.estimators"
    assert re.match(rf"{name}: error: (argument )?{option.split()[0]}\W", error)


def test_an_estimator_may_come_with_a_normalisation() -> None:
    common = replace(Settings(), steps=24, out="some")
    kind = STUDY.settings_of("exact:none", common)
    assert (kind.estimator, kind.normalize) == ("exact", "none")
    (name,) = study.plan({"exact:none": kind}, 1)
    assert name == "exact-none-seed0-steps24"
    with pytest.raises(
        SettingsError, match=r"--normalize topk does not go with the other settings"
    ):
        STUDY.settings_of("sparsemixer:topk", common)


def test_compares_all_estimators_unless_told(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = {}

    def train_all(runs: dict[str, Settings], workers: pool.Workers, _finished: object) -> None:
        planned.update(runs)
        assert workers.count == 1  # as many as there are cores
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "train_all", train_all)
    assert program.main([*tiny, "--out", str(tmp_path)]) == 130
    assert {one.estimator for one in planned.values()} == set(known_estimators())
    assert {one.normalize for one in planned.values()} == {None, "none"}
    assert len(planned) == 5 * (len(known_estimators()) + 1)
