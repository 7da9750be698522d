"""A comparison of kinds of the language model: its plan, its numbers, its report, its failures."""

from __future__ import annotations

import math
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from studies.common import pool, study
from studies.common.intervals import Interval, each_confidence, t_interval
from studies.common.study import Kind
from studies.estimators.program import STUDY
from training.settings import Settings, SettingsError

OTHER = "straight_through"


# ---- the plan


def test_plans_seed_by_seed_and_exact_first() -> None:
    common = replace(Settings(), steps=24, out="some")
    names = [f"{name}-seed{seed}-steps24" for seed in (0, 1) for name in ("exact", OTHER)]
    kinds = {name: STUDY.settings_of(name, common) for name in ("exact", OTHER)}
    runs = study.plan(kinds, 2)
    assert list(runs) == names
    assert [one.seed for one in runs.values()] == [0, 0, 1, 1]
    assert [one.estimator for one in runs.values()] == ["exact", OTHER] * 2
    assert [one.out for one in runs.values()] == [f"some/{name}" for name in names]


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
    found = study.differences(
        {"exact": rough, "up": rough + np.array([0.1, 0.2, 0.3]), "down": rough - 0.1}, "exact"
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
    assert study.verdict(STUDY, {"a": same, "b": worse, "c": better, "d": same}, 5) == [
        "c beats exact by 0.0120 (0.0030 to 0.0210) bits per byte",
        "b is worse than exact by 0.0200 (0.0100 to 0.0300) bits per byte",
        "a, d: no difference that 5 seeds can show",
    ]
    assert study.verdict(STUDY, {"a": same}, 3) == [
        "a: no difference that 3 seeds can show",
        nothing,
    ]
    assert study.verdict(STUDY, {"b": worse}, 5)[1:] == [nothing]
    assert study.verdict(STUDY, {"a": none}, 1) == ["a: n/a, one seed gives no interval"]
    assert study.verdict(STUDY, {"a": none, "b": worse}, 5)[1:] == [
        "a: n/a, not tested by then",
        nothing,
    ]


def make_kind(losses: list[list[float]], step_seconds: float) -> Kind:
    values = np.array(losses)
    return Kind(values[:, -1], np.arange(1, values.shape[1] + 1) * 10.0, values, step_seconds)


def test_equal_time_is_when_the_fastest_ends() -> None:
    fast = make_kind([[4, 3, 2], [5, 4, 3]], 0.1)  # at 1, 2 and 3 seconds
    slow = make_kind([[4, 3, 2], [5, 4, 3]], 0.16)  # at 1.6, 3.2 and 4.8
    end = study.equal_time({"exact": slow, "other": fast})
    assert end == pytest.approx([3.0])
    assert fast.at(end).tolist() == [[2], [3]]
    # Seven eighths of the way from the first test to the second.
    assert slow.at(end) == pytest.approx(np.array([[3.125], [4.125]]))
    assert np.isnan(slow.at(np.array([1.5, 4.9]))).all()


def test_times_at_which_two_curves_are_known() -> None:
    exact = np.array([1.0, 2.0, 3.0])
    times = study.shared_times
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
    kinds = study.gather(runs, {"exact": 0.5, OTHER: 0.6})
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
    study.report(STUDY, tmp_path, common, kinds)
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
