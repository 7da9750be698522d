"""The figures: what stands in them, that nothing overlaps, and that the files are repeatable."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from lm import figures, specialization
from lm.figures import Comparison, Curve
from lm.intervals import t_interval
from lm.specialization import BYTE_CLASSES, Specialization

DOMAINS = ("python", "english", "cpp")
NGRAMS = {3: 2.91, 4: 2.36, 5: 2.19}
FINAL = {"python": 1.52, "english": 1.73, "cpp": 1.56}


def make_records(count: int, layers: int = 2, experts: int = 4) -> list[dict[str, Any]]:
    """A run's records; a dense model's where there are no layers."""
    draw = random.Random(count)
    records = []
    for number in range(1, count + 1):
        losses = {name: 1.5 + 6 / number + draw.uniform(0, 0.2) for name in DOMAINS}
        loads = [[draw.uniform(0.5, 2) for _ in range(experts)] for _ in range(layers)]
        record: dict[str, Any] = {
            "step": 10 * number,
            "seconds": 0.9 * number,
            "bytes": 10_240 * number,
            "loss": sum(losses.values()) / 3,
            "domain_loss": losses,
            "load": [[value / sum(load) for value in load] for load in loads],
        }
        if number % 4 == 0:
            record["held_out"] = {name: loss + 0.1 for name, loss in losses.items()}
        records.append(record)
    return records


def make_specialization(layers: int, experts: int, names: tuple[str, ...]) -> list[Specialization]:
    """The first layer routes by label, the others at random."""
    labels = torch.arange(600) % len(names)
    indices = [torch.randint(experts, (600, 2)) for _ in range(layers)]
    indices[0] = labels[:, None] % experts
    kind = "domain" if names is DOMAINS else "byte class"
    return specialization.specialize(indices, labels, names, kind, experts, torch.Generator())


def specialization_figure(layers: int, experts: int) -> Figure:
    classes = make_specialization(layers, experts, BYTE_CLASSES)
    return figures.specialization(classes, make_specialization(layers, experts, DOMAINS))


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
    return figures.study(by_steps, by_seconds, names[0], f"{seeds} seeds")


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def meshes(figure: Figure) -> list[QuadMesh]:
    """The maps, without the colour bar's own."""
    return [mesh for axes in figure.axes[:-1] for mesh in axes.findobj(QuadMesh)]


def missing(figure: Figure) -> int:
    return sum(int(np.ma.count_masked(mesh.get_array())) for mesh in meshes(figure))


MAKERS = {
    "loss": lambda: figures.loss_curves(make_records(12), NGRAMS, FINAL),
    "load": lambda: figures.expert_load(make_records(12)),
    "specialization": lambda: specialization_figure(1, 4),
    "comparison": lambda: figures.comparison({"MoE": [make_records(12)], "dense": []}),
    "estimators": estimators_figure,
}


# ---- files


@pytest.mark.parametrize("name", MAKERS)
def test_files_are_whole_and_repeatable(name: str, tmp_path: Path) -> None:
    settings = dict(matplotlib.rcParams)
    figure = MAKERS[name]()
    first = figures.save(figure, tmp_path / "new" / "folder", name)
    assert first == tuple(tmp_path / "new" / "folder" / f"{name}.{end}" for end in ("png", "svg"))
    torch.manual_seed(0)  # the test's start, so that the figure made anew has the same experts
    for again in (figure, MAKERS[name]()):
        for before, after in zip(first, figures.save(again, tmp_path, name), strict=True):
            assert before.read_bytes() == after.read_bytes()
    picture = imread(first[0])
    assert picture.shape[1] <= figures.WIDTH * figures.DPI
    assert picture[..., :3].std() > 0.02  # not blank
    assert len(ElementTree.parse(first[1]).findall(".//{*}path")) > 20
    assert dict(matplotlib.rcParams) == settings


# ---- loss


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("final", [None, FINAL])
def test_loss_curves_name_everything_once(count: int, final: dict[str, float] | None) -> None:
    found = texts(figures.loss_curves(make_records(count), NGRAMS, final))
    for label in ("3-grams 2.91", "4-grams 2.36", "5-grams 2.19", *DOMAINS, "mean, held out"):
        assert found.count(label) == 1
    for label in ("python 1.52", "english 1.73", "cpp 1.56", "mean 1.60"):
        assert found.count(label) == (final is not None)
    assert "loss (bits per byte)" in found


def test_loss_curves_hide_nothing() -> None:
    close = {order: 2 + order / 1000 for order in range(1, 6)}
    figure = figures.loss_curves(make_records(40), close, FINAL)
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    boxes = [axes.get_window_extent(), *(text.get_window_extent() for text in axes.texts)]
    boxes += [legend.get_window_extent()]
    assert len(boxes) == 1 + 5 + 4 + 1
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_loss_axis_shows_the_end_rather_than_the_start() -> None:
    def limits(records: list[dict[str, Any]], ngrams: dict[int, float]) -> tuple[float, float]:
        return figures.loss_curves(records, ngrams, None).axes[0].get_ylim()

    lowest = min(min(record["domain_loss"].values()) for record in make_records(40))
    bottom, top = limits(make_records(40), {})
    assert lowest - 0.15 <= bottom < lowest + 0.15  # below the smoothed line
    assert top == figures.TOP_BITS
    assert limits(make_records(1), {})[1] > 7.5  # where there is only the start, it is shown
    assert limits(make_records(40), {1: 4.9})[1] > 4.9


def test_loss_of_a_domain_that_some_records_lack() -> None:
    records = make_records(12, layers=0)
    del records[3]["domain_loss"]["cpp"]
    records[4]["domain_loss"]["cpp"] = None
    records[5]["held_out"] = None
    figure = figures.loss_curves(records, {}, {**FINAL, "new": 3.0})
    assert "new 3.00" in texts(figure)
    lengths = {len(line.get_xdata()) for line in figure.axes[0].lines}
    assert {12, 10, 3} <= lengths
    assert figures.losses(records, "held_out", "cpp")[5:7] == pytest.approx(
        [math.nan] * 2, nan_ok=True
    )


def test_one_domain_has_no_mean() -> None:
    records = [{"bytes": n, "domain_loss": {"notes": 3.0}} for n in (1, 2)]
    found = texts(figures.loss_curves(records, NGRAMS, {"notes": 2.5}))
    assert "notes 2.50" in found
    assert not any("mean" in text for text in found)


def test_smooth() -> None:
    assert figures.smooth(np.array([])).tolist() == []
    assert figures.smooth(np.array([3.0])).tolist() == [3.0]
    line = np.arange(200.0)
    smoothed = figures.smooth(line)
    np.testing.assert_allclose(smoothed[:195], line[:195])  # a slope is not bent
    assert smoothed[-1] == pytest.approx(np.mean(line[-6:]))
    noise = np.random.default_rng(0).normal(size=400)
    assert figures.smooth(noise)[10:].std() < 0.4


def test_comparison_has_one_colour_per_kind_and_one_line_per_seed() -> None:
    runs = [make_records(count, layers=0) for count in (20, 30, 40)]
    figure = figures.comparison({"MoE": runs, "dense": runs[:1]})
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
    bottom, top = figures.shown_differences([curve])
    assert bottom < 0
    assert curve.y.high[late].max() < top < 0.3
    assert figures.shown_differences([]) == (-figures.COMPARED_BITS, figures.COMPARED_BITS)
    losses = [*make_comparison(100).loss.values()]
    bottom, top = figures.shown_losses(losses)
    assert bottom < min(curve.y.low.min() for curve in losses)
    assert top == max(curve.y.mean[-1] for curve in losses) + figures.COMPARED_BITS


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


# ---- experts


@pytest.mark.parametrize(
    ("count", "layers", "experts"), [(12, 4, 8), (1, 1, 2), (3, 5, 64), (2, 16, 128)]
)
def test_expert_load_has_a_map_per_layer(count: int, layers: int, experts: int) -> None:
    figure = figures.expert_load(make_records(count, layers, experts))
    maps = meshes(figure)
    assert [mesh.get_array().shape for mesh in maps] == [(experts, count)] * layers
    found = texts(figure)
    assert [text for text in found if text.startswith("layer ")] == [
        f"layer {layer}" for layer in range(layers)
    ]
    assert {"expert", "load (1 = even share)", "training text read"} <= set(found)


def test_expert_load_is_relative_to_the_even_share() -> None:
    records = make_records(2, layers=1)
    records[0]["load"], records[1]["load"] = [[0.25, 0.5, 0.25, 0]], [[0.125, 0.125, 0.5, 0.25]]
    figure = figures.expert_load(records)
    (mesh,) = meshes(figure)
    # One expert took nothing, so the scale is the wider one; nothing is its end.
    assert mesh.get_array().tolist() == [[0, -1], [1, -1], [0, 1], [-2, 0]]
    assert mesh.get_clim() == (-2, 2)
    assert {"1/4", "1/2", "1", "2", "4"} <= set(texts(figure))
    records[0]["load"] = records[1]["load"]
    (mesh,) = meshes(figures.expert_load(records))
    assert mesh.get_clim() == (-1, 1)


def test_intervals_end_where_the_records_are() -> None:
    assert figures.interval_edges(np.array([20.0, 30.0, 50.0])).tolist() == [10, 20, 30, 50]
    assert figures.interval_edges(np.array([10.0, 30.0])).tolist() == [0, 10, 30]
    assert figures.interval_edges(np.array([20.0])).tolist() == [0, 20]


def test_a_dense_model_has_no_expert_figure() -> None:
    dense = make_records(3, layers=0)
    assert dense[0]["load"] == []
    with pytest.raises(ValueError, match="a dense model has no experts"):
        figures.expert_load(dense)
    with pytest.raises(ValueError, match="a dense model has no experts"):
        figures.specialization([], [])
    figures.loss_curves(dense, NGRAMS, FINAL)
    figures.comparison({"dense": [dense]})


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (5, 8), (2, 64)])
def test_specialization_has_two_maps_per_layer(layers: int, experts: int) -> None:
    classes = make_specialization(layers, experts, BYTE_CLASSES)
    domains = make_specialization(layers, experts, DOMAINS)
    figure = figures.specialization(classes, domains)
    shapes = {mesh.get_array().shape for mesh in meshes(figure)}
    assert len(meshes(figure)) == 2 * layers
    assert shapes == {(len(BYTE_CLASSES), experts), (len(DOMAINS), experts)}
    found = "\n".join(texts(figure))
    for layer, pair in enumerate(zip(classes, domains, strict=True)):
        assert f"layer {layer}\n" in found
        for result in pair:
            assert result.in_words().replace("; ", "\n") in found
    assert ("flat: " in found) == (layers > 1)
    assert all(name in found for name in (*BYTE_CLASSES, *DOMAINS, "byte class", "domain"))


def test_numbers_stand_in_cells_that_have_room() -> None:
    few = specialization_figure(1, 8)
    numbers = [text.get_text() for axes in few.axes for text in axes.texts]
    assert len(numbers) == 8 * (len(BYTE_CLASSES) + len(DOMAINS)) - missing(few)
    assert "0.0" in numbers
    assert not any(axes.texts for axes in specialization_figure(2, 64).axes)


def test_an_expert_without_bytes_is_a_grey_column() -> None:
    labels = torch.arange(300) % 3
    (result,) = specialization.specialize(
        [labels[:, None]], labels, DOMAINS, "domain", 4, torch.Generator()
    )
    figure = figures.specialization([result], [result])
    for mesh in meshes(figure):
        lift = mesh.get_array()
        assert lift.mask[:, 3].all()
        assert not lift.mask[:, :3].any()
        assert lift[0, 0] == pytest.approx(math.log2(3))
        assert lift[0, 1] == -2  # never: the lower end of the scale
