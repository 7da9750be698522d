"""The comparison with dense models: where it flips, and what it says."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dense_comparison import COMMON, ended, made_times
from studies.common.outcome import Outcome
from studies.dense import flip, report
from studies.dense.confirmation import DENSE, MIXTURE, Confirmed
from studies.dense.search import Choice, Tried


def test_lengths() -> None:
    assert flip.lengths({"mixture": 1600, "dense": 1420}) == {
        "mixture": [355, 710, 1420, 1600],
        "dense": [355, 710, 1420],
    }
    assert flip.lengths({"mixture": 3, "dense": 3}) == {"mixture": [1, 3], "dense": [1, 3]}


def test_steps_to_a_loss() -> None:
    curve = {400: 3.0, 100: 5.0, 200: 4.0}  # straight over the logarithm
    assert flip.steps_to(5.0, curve) == pytest.approx(100)
    assert flip.steps_to(4.5, curve) == pytest.approx(100 * math.sqrt(2))
    assert flip.steps_to(3.0, curve) == 400
    assert math.isnan(flip.steps_to(5.1, curve))
    assert math.isnan(flip.steps_to(2.9, curve))
    assert flip.steps_to(2.0, {7: 2.0}) == 7
    # Of two crossings the later; a stretch without a slope ends at its end.
    assert flip.steps_to(4.0, {1: 4.5, 2: 3.0, 4: 5.0, 8: 3.0}) == pytest.approx(4 * math.sqrt(2))
    assert flip.steps_to(4.0, {1: 4.0, 2: 4.0, 4: 3.0}) == pytest.approx(2)


def falling(start: float, lengths: Sequence[int]) -> dict[int, float]:
    """One bit less for each doubling of the steps."""
    return {steps: start - math.log2(steps) for steps in lengths}


@pytest.mark.parametrize("head_start", [0.3, 0.0, -0.3])
def test_the_ratio_is_that_of_the_steps_for_the_same_loss(head_start: float) -> None:
    mixture = falling(10 - head_start, [250, 500, 1000, 1100])
    dense = falling(10, [250, 500, 1000])
    assert flip.flip_ratio(mixture, dense) == pytest.approx(2**head_start)


def test_a_ratio_out_of_reach_is_none() -> None:
    mixture, dense = falling(7, [250, 500, 1000]), falling(10, [250, 500, 1000])
    assert math.isnan(flip.flip_ratio(mixture, dense))
    assert math.isnan(flip.flip_ratio(dense, mixture))


def test_the_mean_ratio_is_geometric() -> None:
    mean, low, high = flip.mean_ratio([0.5, 2.0], 0.95)
    assert mean == pytest.approx(1)
    assert math.log(high) == pytest.approx(12.706205 * math.log(2), rel=1e-5)
    assert low == pytest.approx(1 / high)
    assert np.isnan(flip.mean_ratio([0.5, math.nan], 0.95)).all()
    mean, low, _ = flip.mean_ratio([0.5], 0.95)
    assert mean == pytest.approx(0.5)
    assert math.isnan(low)


def confirmed(gain: Sequence[float], seeds: int = 3) -> Confirmed:
    """The mixture's losses lie below those of the dense model by `gain`, seed by seed."""

    def runs(steps: int, gains: Sequence[float]) -> list[Outcome]:
        settings = replace(COMMON, steps=steps)
        return [
            ended(settings, 3.0, 12 - math.log2(steps) + 0.5 * seed - gains[seed])
            for seed in range(seeds)
        ]

    return Confirmed(
        {
            MIXTURE: {steps: runs(steps, gain) for steps in (200, 400, 800, 900)},
            DENSE: {steps: runs(steps, [0.0] * seeds) for steps in (200, 400, 800)},
        }
    )


def test_differences_are_taken_seed_by_seed() -> None:
    found = confirmed([0.1, 0.2, 0.3])
    assert found.shared == [200, 400, 800]
    assert {side: found.own(side) for side in (MIXTURE, DENSE)} == {MIXTURE: 900, DENSE: 800}
    reach = 4.302653 * 0.1 / math.sqrt(3)  # the quantile of 2 degrees of freedom
    for steps in found.shared:
        apart = found.at_equal_bytes(steps)
        assert tuple(apart) == pytest.approx((-0.2, -0.2 - reach, -0.2 + reach), abs=1e-6)
    longer = math.log2(900 / 800)
    assert found.at_equal_time().mean == pytest.approx(-0.2 - longer)
    assert found.flips() == pytest.approx([2**0.1, 2**0.2, 2**0.3])
    assert found.flip().mean == pytest.approx(2**0.2)


def test_verdict() -> None:
    unit = r"\d\.\d{4} \(\d\.\d{4} to \d\.\d{4}\) bits per byte"
    better = report.verdict("first", confirmed([0.1, 0.2, 0.3]))
    assert re.fullmatch(f"first: at equal time the mixture is better by {unit}", better)
    worse = report.verdict("first", confirmed([-0.5, -0.6, -0.5]))
    assert re.fullmatch(f"first: at equal time the mixture is worse by {unit}", worse)
    unclear = report.verdict("first", confirmed([-0.5, 0.6, -0.5]))
    assert unclear == "first: at equal time no difference that 3 seeds can show"
    alone = report.verdict("first", confirmed([0.1], seeds=1))
    assert alone == "first: one seed gives no interval"


@pytest.mark.parametrize("seeds", [1, 3])
def test_report(seeds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = replace(COMMON, data=("/home/me/text",), out=str(tmp_path))
    names = {MIXTURE: "E32-K2-shared", DENSE: "W1024"}
    steps = {"E32-K2-shared": 900, "W1024": 800}
    runs = {name: ended(replace(common, steps=some), 2.5) for name, some in steps.items()}
    study = report.Study(
        "It compares.",
        common,
        100.0,
        made_times(**{"E32-K2-shared": [0.1], "W1024": [0.125]}),
        steps,
        {name: Tried({3e-3: 2.7}, run) for name, run in runs.items()},
        {side: Choice(name, runs[name].settings, {3e-3: 2.5}) for side, name in names.items()},
        {"first": ["python", "cpp"], "second": ["prose.txt"]},
        {"first": confirmed([0.1, 0.2, 0.3], seeds), "second": confirmed([3.0, 0.2, 0.3], seeds)},
    )
    report.report(study)
    output = capsys.readouterr().out
    assert "chosen: mixture E32-K2-shared, dense W1024" in output
    assert "first text: python, cpp" in output
    assert "equal time: held-out after 100 s (steps: mixture 900, dense 800)" in output
    assert f"second: in 1 of {report.in_words(seeds)} one side's shortest run is better" in output
    (row,) = re.findall(r"^ first +0\.8000 .*$", output, re.M)
    if seeds == 1:
        assert row.split() == ["first", "0.8000", f"{2**0.1:.4f}", "n/a"]
        assert "first: one seed gives no interval" in output
    else:
        assert row.split()[2] == f"{2**0.2:.4f}"
        assert "first: at equal time the mixture is better by 0.3699 (" in output
    assert "…" not in output
    page = (tmp_path / "dense.md").read_text()
    assert page.count("|---|") == 5
    content = (tmp_path / "dense.json").read_text()
    assert "NaN" not in content
    assert str(tmp_path) not in content
    assert "/home" not in content
