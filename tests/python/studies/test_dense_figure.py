"""The figure of the comparison with dense models: what stands in it, and that nothing overlaps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure

from drawn import check_files, check_nothing_is_hidden, make_records, texts
from studies.dense.confirmation import DENSE, MIXTURE, Confirmed
from studies.dense.figure import draw
from training import figures

TITLES = {MIXTURE: "mixture E32-K2-shared", DENSE: "dense W1024"}


def runs(steps: int, seeds: int, held_out: float) -> list[Any]:
    """As outcomes are, with a record for every ten steps."""
    records = [SimpleNamespace(**record) for record in make_records(steps // 10, layers=0)]
    return [SimpleNamespace(records=records, held_out=held_out + 0.01 * s) for s in range(seeds)]


def confirmed(gain: float, seeds: int = 3) -> Confirmed:
    lengths = {100: 3.0, 200: 2.7, 400: 2.4}
    return Confirmed(
        {
            MIXTURE: {steps: runs(steps, seeds, loss - gain) for steps, loss in lengths.items()},
            DENSE: {
                steps: runs(steps, seeds, loss) for steps, loss in {**lengths, 440: 2.36}.items()
            },
        }
    )


def make(gain: float = 0.1) -> Figure:
    return draw(
        {"first": confirmed(gain), "second": confirmed(0.05, seeds=1)},
        TITLES,
        {MIXTURE: 0.11, DENSE: 0.1},
    )


def test_files_are_whole_and_repeatable(tmp_path: Path) -> None:
    check_files(make, "dense", tmp_path)


def test_lines_are_seeds_over_the_time_that_steps_take() -> None:
    by_time, by_length, second, _ = make().axes
    colours = [line.get_color() for line in by_time.lines]
    assert colours == [figures.COLOURS[0]] * 3 + [figures.COLOURS[1]] * 3
    ends = [line.get_xdata()[-1] for line in by_time.lines]
    assert ends == pytest.approx([400 * 0.11] * 3 + [440 * 0.1] * 3)
    assert len(second.lines) == 2
    means = [line.get_ydata() for line in by_length.lines[:2]]
    assert means[0] == pytest.approx([2.91, 2.61, 2.31])
    assert means[1] == pytest.approx([3.01, 2.71, 2.41, 2.37])
    assert [*by_length.lines[1].get_xdata()] == [100, 200, 400, 440]


def test_says_where_both_are_equal() -> None:
    found = texts(make())
    assert {*TITLES.values(), "training time (seconds)", "optimizer steps of the run"} <= {*found}
    (first, second) = (text for text in found if text.startswith("step time, mixture over dense"))
    assert "measured 1.10, equal at 1.2" in first
    assert first != second
    out_of_reach = [text for text in texts(make(gain=2)) if "equal out of reach" in text]
    assert len(out_of_reach) == 1


def test_marks_the_steps_that_the_same_loss_takes() -> None:
    (bar,) = make().axes[1].lines[2:]
    start, end = bar.get_xdata()
    assert end == 440  # the dense model's longest run ends at that loss
    assert 200 < start < 400
    assert bar.get_ydata() == pytest.approx([2.37, 2.37])
    assert len(make(gain=2).axes[1].lines) == 2


def test_hides_nothing() -> None:
    check_nothing_is_hidden(make())
