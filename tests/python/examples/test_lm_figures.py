"""The figures: what stands in them, that nothing overlaps, and that the files are repeatable."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from drawn import DOMAINS, check_files, make_records, texts
from training import figures, specialization
from training.specialization import BYTE_CLASSES, Specialization

NGRAMS = {3: 2.91, 4: 2.36, 5: 2.19}
FINAL = {"python": 1.52, "english": 1.73, "cpp": 1.56}


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


def meshes(figure: Figure) -> list[QuadMesh]:
    """The maps, without the colour bar's own."""
    return [mesh for axes in figure.axes[:-1] for mesh in axes.findobj(QuadMesh)]


def missing(figure: Figure) -> int:
    return sum(int(np.ma.count_masked(mesh.get_array())) for mesh in meshes(figure))


MAKERS = {
    "loss": lambda: figures.loss_curves(make_records(12), NGRAMS, FINAL),
    "load": lambda: figures.expert_load(make_records(12)),
    "specialization": lambda: specialization_figure(1, 4),
}


# ---- files


@pytest.mark.parametrize("name", MAKERS)
def test_files_are_whole_and_repeatable(name: str, tmp_path: Path) -> None:
    check_files(MAKERS[name], name, tmp_path)


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
