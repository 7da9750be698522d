"""The figures of comparisons: what stands in them, and that nothing overlaps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from drawn import check_files, make_records, texts
from studies.common.figures import (
    COMPARED_BITS,
    Comparison,
    Curve,
    comparison,
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


MAKERS = {
    "comparison": lambda: comparison({"MoE": [make_records(12)], "dense": []}),
    "estimators": estimators_figure,
}


@pytest.mark.parametrize("name", MAKERS)
def test_files_are_whole_and_repeatable(name: str, tmp_path: Path) -> None:
    check_files(MAKERS[name], name, tmp_path)


def test_a_dense_model_alone_can_be_drawn() -> None:
    comparison({"dense": [make_records(3, layers=0)]})


def test_comparison_has_one_colour_per_kind_and_one_line_per_seed() -> None:
    runs = [make_records(count, layers=0) for count in (20, 30, 40)]
    figure = comparison({"MoE": runs, "dense": runs[:1]})
    by_text, by_time = figure.axes
    for axes in (by_text, by_time):
        colours = [line.get_color() for line in axes.lines]
        assert colours == [figures.COLOURS[0]] * 3 + [figures.COLOURS[1]]
    assert by_text.lines[1].get_xdata()[-1] == 30 * 10_240
    assert by_time.lines[1].get_xdata()[-1] == pytest.approx(27)
    found = texts(figure)
    assert found.count("MoE (3 seeds)") == found.count("dense") == 1
    assert "training time (seconds)" in found


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
    figure = estimators_figure()
    figure.draw_without_rendering()
    (legend,) = figure.legends
    boxes = [legend.get_window_extent(), *(axes.get_tightbbox() for axes in figure.axes)]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
