"""The comparison of estimators: what it trains, what its numbers say, and how it ends."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import compare_estimators
from compare_estimators import Kind
from lm import pool
from lm.intervals import Interval, each_confidence, t_interval
from lm.settings import Settings, SettingsError
from torchmoe.nn import known_estimators

RUN = re.compile(r"^  (\w+-seed\d-steps\d+) +held-out ([\d.]+) ", re.MULTILINE)
OTHER = "straight_through"
NAMES = [f"{name}-seed{seed}-steps24" for seed in (0, 1) for name in ("exact", OTHER)]
SHORT = ("--steps", "24", "--checkpoint-every", "8", "--seeds", "2", "--estimators", OTHER)


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the timed steps short where other work has the cores."""
    monkeypatch.setattr(compare_estimators, "cores", lambda: 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("estimators")


# ---- the program


def test_stops(tiny: list[str], folder: Path) -> None:
    options = [*tiny, *SHORT, "--jobs", "1", "--out", str(folder)]
    program = subprocess.Popen(
        [sys.executable, compare_estimators.__file__, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert program.stdout is not None
    for line in program.stdout:
        if RUN.match(line):
            break
    os.killpg(program.pid, signal.SIGINT)  # as a terminal does
    _, error = program.communicate(timeout=60)
    assert program.returncode == 130
    assert error == "\ninterrupted; the same command goes on from here\n"
    assert not (folder / "estimators.json").exists()
    assert 1 <= len(list(folder.iterdir())) < len(NAMES)


def test_goes_on_and_compares(
    tiny: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = folder / NAMES[0] / "log.txt"
    before = log.read_text()
    assert "tokens/s" in before
    assert compare_estimators.main([*tiny, *SHORT, "--jobs", "2", "--out", str(folder)]) == 0
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


def test_a_failed_run_ends_it(
    tiny: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*tiny, *SHORT, "--jobs", "1", "--out", str(folder)]
    with pytest.raises(SystemExit, match="2"):
        compare_estimators.main([*options, "--lr", "0.1"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(
        "compare_estimators.py: error: exact-seed0-steps24: --lr is 0.003 in the run to resume"
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
    with pytest.raises(SystemExit):
        compare_estimators.main([*tiny, *option.split(), "--out", str(folder)])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.match(f"compare_estimators.py: error: (argument )?{option.split()[0]}\\W", error)


def test_plans_seed_by_seed_and_exact_first() -> None:
    common = replace(Settings(), steps=24, out="some")
    kinds = {name: compare_estimators.settings_of(name, common) for name in ("exact", OTHER)}
    runs = compare_estimators.plan(kinds, 2)
    assert list(runs) == NAMES
    assert [one.seed for one in runs.values()] == [0, 0, 1, 1]
    assert [one.estimator for one in runs.values()] == ["exact", OTHER] * 2
    assert [one.out for one in runs.values()] == [f"some/{name}" for name in NAMES]


def test_an_estimator_may_come_with_a_normalisation() -> None:
    common = replace(Settings(), steps=24, out="some")
    kind = compare_estimators.settings_of("exact:none", common)
    assert (kind.estimator, kind.normalize) == ("exact", "none")
    (name,) = compare_estimators.plan({"exact:none": kind}, 1)
    assert name == "exact-none-seed0-steps24"
    with pytest.raises(SettingsError, match=r"--normalize must be none with --estimator sparse"):
        compare_estimators.settings_of("sparsemixer:topk", common)


def test_compares_all_estimators_unless_told(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = {}

    def train_all(runs: dict[str, Settings], jobs: int, _finished: object) -> None:
        planned.update(runs)
        assert jobs == 1  # as many as there are cores
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "train_all", train_all)
    assert compare_estimators.main([*tiny, "--out", str(tmp_path)]) == 130
    assert {one.estimator for one in planned.values()} == set(known_estimators())
    assert {one.normalize for one in planned.values()} == {None, "none"}
    assert len(planned) == 5 * (len(known_estimators()) + 1)


# ---- a run in its process


def test_an_unexpected_error_is_one_line_and_its_traceback_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(_settings: Settings, _text: object) -> None:
        raise ValueError("MoE: top_k must\nbe 1, got 2")

    monkeypatch.setattr(pool, "trained", trained)
    monkeypatch.setattr(pool, "load_text", lambda _data: None)
    with pytest.raises(RuntimeError, match=r"ValueError: MoE: top_k must be 1, got 2 \(see .*log"):
        pool.train_one(replace(Settings(), out=str(tmp_path)))
    assert "Traceback" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (BrokenProcessPool("A child process terminated"), "exact: its process was ended from out"),
        (SettingsError("the loss is nan"), "exact: the loss is nan"),
    ],
)
def test_a_run_that_failed_is_named(error: Exception, message: str) -> None:
    future: Future[Any] = Future()
    future.set_exception(error)
    with pytest.raises(pool.RunError, match=message):
        pool.outcome_of("exact", future)


# ---- numbers


def test_t_interval() -> None:
    # Mean 3, standard deviation sqrt(2.5), 2.776445 the quantile of 4 degrees of freedom.
    reach = 2.776445 * math.sqrt(2.5 / 5)
    mean, low, high = t_interval(np.array([5.0, 1, 3, 2, 4]), 0.95)
    assert (mean, low, high) == pytest.approx((3, 3 - reach, 3 + reach), abs=1e-5)
    _, low, high = t_interval(np.array([1.0, 2, 3, 4, 5]), 0.99)  # 4.604095
    assert high - low == pytest.approx(2 * 4.604095 * math.sqrt(0.5), abs=1e-5)
    curves = t_interval(np.array([[1.0, 7], [3.0, 7]]), 0.95)  # 12.706205 of one degree
    assert np.array(curves) == pytest.approx(
        np.array([[2, 7], [2 - 12.706205, 7], [2 + 12.706205, 7]]), abs=1e-5
    )


def test_one_seed_has_no_interval() -> None:
    mean, low, high = t_interval(np.array([[1.0, 2.0]]), 0.95)
    assert mean.tolist() == [1, 2]
    assert np.isnan([low, high]).all()


def test_differences_are_paired_and_corrected() -> None:
    assert each_confidence(0.95, 5) == pytest.approx(0.99)
    rough = np.array([2.0, 3.0, 4.0])  # the seeds differ much more than the estimators
    found = compare_estimators.differences(
        {"exact": rough, "up": rough + np.array([0.1, 0.2, 0.3]), "down": rough - 0.1}
    )
    assert list(found) == ["up", "down"]
    # 97.5 % each: the quantile of 0.9875 at 2 degrees of freedom is 6.205347.
    reach = 6.205347 * 0.1 / math.sqrt(3)
    assert tuple(found["up"]) == pytest.approx((0.2, 0.2 - reach, 0.2 + reach), abs=1e-6)
    assert tuple(found["down"]) == pytest.approx((-0.1, -0.1, -0.1), abs=1e-6)


def interval(mean: float, low: float, high: float) -> Interval:
    return Interval(np.array(mean), np.array(low), np.array(high))


def test_verdict() -> None:
    nothing = "no estimator beats exact beyond its confidence interval"
    better = interval(-0.012, -0.021, -0.003)
    worse = interval(0.02, 0.01, 0.03)
    same = interval(-0.01, -0.03, 0.01)
    none = interval(-0.01, math.nan, math.nan)
    assert compare_estimators.verdict({"a": same, "b": worse, "c": better, "d": same}, 5) == [
        "c beats exact by 0.0120 (0.0030 to 0.0210) bits per byte",
        "b is worse than exact by 0.0200 (0.0100 to 0.0300) bits per byte",
        "a, d: no difference that 5 seeds can show",
    ]
    assert compare_estimators.verdict({"a": same}, 3) == [
        "a: no difference that 3 seeds can show",
        nothing,
    ]
    assert compare_estimators.verdict({"b": worse}, 5)[1:] == [nothing]
    assert compare_estimators.verdict({"a": none}, 1) == ["a: n/a, one seed gives no interval"]
    assert compare_estimators.verdict({"a": none, "b": worse}, 5)[1:] == [
        "a: n/a, not tested by then",
        nothing,
    ]


def make_kind(losses: list[list[float]], step_seconds: float) -> Kind:
    values = np.array(losses)
    return Kind(values[:, -1], np.arange(1, values.shape[1] + 1) * 10.0, values, step_seconds)


def test_equal_time_is_when_the_fastest_ends() -> None:
    fast = make_kind([[4, 3, 2], [5, 4, 3]], 0.1)  # at 1, 2 and 3 seconds
    slow = make_kind([[4, 3, 2], [5, 4, 3]], 0.16)  # at 1.6, 3.2 and 4.8
    end = compare_estimators.equal_time({"exact": slow, "other": fast})
    assert end == pytest.approx([3.0])
    assert fast.at(end).tolist() == [[2], [3]]
    # Seven eighths of the way from the first test to the second.
    assert slow.at(end) == pytest.approx(np.array([[3.125], [4.125]]))
    assert np.isnan(slow.at(np.array([1.5, 4.9]))).all()


def test_times_at_which_two_curves_are_known() -> None:
    exact = np.array([1.0, 2.0, 3.0])
    times = compare_estimators.shared_times
    assert times(np.array([1.6, 3.2, 4.8]), exact).tolist() == [2, 3]
    assert times(np.array([0.9, 1.8, 2.7]), exact).tolist() == [1, 2, 2.7]
    assert times(exact, exact).tolist() == [1, 2, 3]
    assert times(np.array([4.0, 8.0]), exact).tolist() == []


def test_curves_keep_the_steps_at_which_all_runs_were_tested() -> None:
    def run(steps: list[int]) -> SimpleNamespace:
        records = [
            SimpleNamespace(step=step, held_out={"a": step, "b": step + 1.0}) for step in steps
        ]
        records.insert(1, SimpleNamespace(step=1, held_out={}))
        return SimpleNamespace(records=records, held_out=2.0)

    runs: Any = {"exact": [run([4, 8, 12]), run([4, 7, 8, 12])], OTHER: [run([4, 5, 8, 12])] * 2}
    kinds = compare_estimators.gather(runs, {"exact": 0.5, OTHER: 0.6})
    for kind in kinds.values():
        assert kind.steps.tolist() == [4, 8, 12]
        assert kind.losses.tolist() == [[4.5, 8.5, 12.5]] * 2
        assert kind.final.tolist() == [2, 2]
    assert kinds[OTHER].seconds == pytest.approx(np.array([2.4, 4.8, 7.2]))


@pytest.mark.parametrize("seeds", [1, 3])
def test_report_with_and_without_intervals(
    seeds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(0)
    curves = 3 + draw.uniform(0, 0.1, (seeds, 4)).cumsum(axis=1)[:, ::-1]
    kinds = {
        "exact": make_kind(curves.tolist(), 0.1),
        "gumbel_straight_through": make_kind((curves - 0.5).tolist(), 0.1),
        "very_slow": make_kind(curves.tolist(), 10),  # not tested while the others train
    }
    common = replace(Settings(), steps=40, data=("/home/me/text",), out="/home/me/runs")
    compare_estimators.report(tmp_path, common, kinds)
    steps, time = capsys.readouterr().out.split("equal time")
    row = next(line for line in steps.splitlines() if line.startswith(" gumbel")).split()[1:]
    assert row[0] == f"{np.mean(curves[:, -1]) - 0.5:.4f}"
    if seeds == 1:
        assert row[1:] == ["n/a", "-0.5000", "n/a"]
        assert "very_slow: n/a, one seed gives no interval" in time
    else:
        assert row[-4:] == ["-0.5000", "-0.5000", "to", "-0.5000"]
        assert "gumbel_straight_through beats exact by 0.5000 (0.5000 to 0.5000)" in steps
        assert "very_slow: n/a, not tested by then" in time
    assert "…" not in steps + time  # the tables fit where nobody says how wide the terminal is
    content = (tmp_path / "estimators.json").read_text()
    assert "NaN" not in content
    assert "/home" not in content
