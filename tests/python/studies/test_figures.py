"""The figures of comparisons: what stands in them, and that nothing overlaps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from drawn import check_files, check_nothing_is_hidden, texts
from studies.common.figures import (
    COMPARED_BITS,
    Comparison,
    Curve,
    shown_differences,
    shown_losses,
    study,
)
from studies.common.intervals import t_interval
from training import figures

ESTIMATORS = ("exact", "one", "another_one", "gumbel_something", "fifth", "sixth")


def make_comparison(step: float, seeds: int = 3, names: tuple[str, ...] = ESTIMATORS) -> Comparison:
    """Curves of loss at 12 points `step` apart, each estimator 0.01 above the one before."""
    draw = np.random.default_rng(0)
    x = np.arange(1.0, 13.0)
    found = Comparison({}, {})
    noise = {name: draw.normal(0, 0.003, (seeds, 12)) for name in names}
    for index, name in enumerate(names):
        difference = 0.01 * index + noise[name] - noise[names[0]]
        found.loss[name] = Curve(step * x, t_interval(2 + 2 / x + difference, 0.95))
        if index:
            found.difference[name] = Curve(step * x, t_interval(difference, 0.95))
    return found


def estimators_figure(seeds: int = 3, names: tuple[str, ...] = ESTIMATORS) -> Figure:
    by_steps, by_seconds = (make_comparison(step, seeds, names) for step in (100, 5.0))
    return study(by_steps, by_seconds, names[0], f"{seeds} seeds")


def test_files_are_whole_and_repeatable(tmp_path: Path) -> None:
    check_files(estimators_figure, "estimators", tmp_path)


def test_estimators_have_one_look_in_all_panels() -> None:
    figure = estimators_figure()
    losses, losses_by_time, difference, difference_by_time = figure.axes
    looks = [figures.line_look(index) for index in range(len(ESTIMATORS))]
    assert len({(look["color"], str(look["linestyle"])) for look in looks}) == len(ESTIMATORS)
    for axes, kinds in ((losses, looks), (difference, looks[1:])):
        for panel in (axes, losses_by_time if axes is losses else difference_by_time):
            wide = [line for line in panel.lines if line.get_linewidth() == 1.6]
            assert [line.get_color() for line in wide] == [look["color"] for look in kinds]
            assert len(panel.collections) == len(kinds)  # the bands
    assert losses.lines[0].get_xdata()[-1] == 1200
    assert losses_by_time.lines[0].get_xdata()[-1] == pytest.approx(60)
    found = texts(figure)
    assert all(found.count(name) == 1 for name in ESTIMATORS)
    assert {"3 seeds", "optimizer steps", "training time (seconds)"} <= set(found)
    assert "difference to exact (bits per byte)\nbelow 0: better" in found


def test_estimators_band_is_the_interval() -> None:
    curve = make_comparison(100).difference["fifth"]
    axes = estimators_figure().axes[2]
    band = axes.collections[3].get_paths()[0].vertices
    for x, low, high in zip(curve.x, curve.y.low, curve.y.high, strict=True):
        at = band[band[:, 0] == x, 1]
        assert {at.min(), at.max()} == {low, high}


def test_estimators_axes_show_the_later_half_and_zero() -> None:
    curve = make_comparison(100, names=("exact", "other")).difference["other"]
    early, late = curve.x < 600, curve.x >= 600
    for line in curve.y:
        line[early] += 50
        line[late] += 0.1
    bottom, top = shown_differences([curve])
    assert bottom < 0
    assert curve.y.high[late].max() < top < 0.3
    assert shown_differences([]) == (-COMPARED_BITS, COMPARED_BITS)
    losses = [*make_comparison(100).loss.values()]
    bottom, top = shown_losses(losses)
    assert bottom < min(curve.y.low.min() for curve in losses)
    assert top == max(curve.y.mean[-1] for curve in losses) + COMPARED_BITS


def test_estimators_of_one_seed_have_no_band() -> None:
    figure = estimators_figure(seeds=1)
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert all(
            not len(band.get_paths()[0].vertices) for band in axes.collections if band.get_paths()
        )
        assert np.isfinite(axes.get_ylim()).all()


def test_estimators_hide_nothing() -> None:
    check_nothing_is_hidden(estimators_figure())
