"""The picture of a gate: its plane, its regions, its styles, and what it refuses to draw."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch.testing import assert_close

from geometry_case import H, drawn, gate
from torchmoe.monitor import RouterGeometry, geometry
from torchmoe.monitor._plane_figure import draw_plane, make_plane, make_regions, make_styles


def arrays(got: RouterGeometry) -> tuple[Any, Any]:
    return got.rows.numpy(), got.bias.numpy()


def test_plot(tmp_path: Path) -> None:
    got = drawn()
    path = tmp_path / "figures" / "plane.png"
    got.plot(path, torch.randn(2, 30, H))
    image = matplotlib.image.imread(path)
    height, width, _ = image.shape
    assert 1200 < height < width < 1800
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50
    got.plot(str(tmp_path / "plane.svg"))
    assert "<svg" in (tmp_path / "plane.svg").read_text()
    got.plot(tmp_path / "none.svg", torch.randn(0, H))
    assert "through 0" in draw_plane(*arrays(got), None).axes[0].get_title()


def test_the_plane_is_where_the_rows_differ() -> None:
    """Hand-made: differences along two axes, and something large that all rows have in common."""
    rows = np.array([[3.0, 0, 50, 0], [-3, 0, 50, 0], [0, 1, 50, 0], [0, -1, 50, 0]])
    tokens = np.array([[1.0, 2, 3, 4], [3, 2, 1, 0]])
    plane = make_plane(rows, np.array([1.0, 2, 3, 4]), tokens)
    assert_close(plane.directions, np.array([[1.0, 0, 0, 0], [0, 1, 0, 0]]), rtol=0, atol=1e-14)
    assert_close(plane.shares.tolist(), [0.9, 0.1], rtol=1e-12, atol=0)
    assert_close(plane.slopes, rows[:, :2], rtol=0, atol=1e-13)
    assert plane.middle.tolist() == [2, 2, 2, 2]
    logits = rows @ plane.middle + np.array([1.0, 2, 3, 4])
    assert_close(plane.heights, logits - logits.mean(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("experts", "size"), [(2, 2), (2, 64), (3, 2), (8, 64), (32, 5), (5, 3)])
def test_the_plane_is_flat(experts: int, size: int) -> None:
    rows, bias = arrays(drawn(experts, size))
    tokens = np.random.default_rng(0).standard_normal((10, size))
    plane = make_plane(rows, bias, tokens)
    assert_close(plane.directions @ plane.directions.T, np.eye(2), rtol=0, atol=1e-12)
    assert 0 <= plane.shares[1] <= plane.shares[0] <= 1 + 1e-12
    variances = ((rows - rows.mean(0)) ** 2).sum()
    assert_close(plane.shares, (plane.slopes**2).sum(0) / variances, rtol=0, atol=1e-12)
    # Through the plane, the logits differ as those of the points that it shows.
    point = np.array([0.3, -0.7])
    logits = rows @ (plane.middle + point @ plane.directions) + bias
    assert_close(plane.slopes @ point + plane.heights, logits - logits.mean(), rtol=0, atol=1e-11)
    if experts == 2:
        # The second direction holds no difference: it is where the mean row points.
        assert plane.shares.tolist() == pytest.approx([1, 0])
        inside = rows @ plane.directions.T @ plane.directions
        assert_close(inside, rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize("experts", [2, 3, 8, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_the_regions_are_where_experts_win(experts: int, bias: bool) -> None:
    rows, biases = arrays(drawn(experts, 7, bias=bias))
    plane = make_plane(rows, biases, None)
    regions = make_regions(plane, 2.0)
    x, y = np.random.default_rng(0).uniform(-2, 2, (2, 3000))
    wins = np.argmax(np.outer(plane.slopes[:, 0], x) + np.outer(plane.slopes[:, 1], y)
                     + plane.heights[:, None], axis=0)  # fmt: skip
    assert set(wins.tolist()) <= regions.keys()
    total = 0.0
    for expert, region in regions.items():
        after = np.roll(region.corners, -1, axis=0)
        inside = np.full(len(x), True)
        for (ax, ay), (bx, by) in zip(region.corners, after, strict=True):
            inside &= (bx - ax) * (y - ay) - (by - ay) * (x - ax) >= -1e-9
            total += (ax * by - bx * ay) / 2
        assert (inside == (wins == expert)).all()
        for start, end, other in zip(region.corners, after, region.neighbours, strict=True):
            if other >= 0:
                between = plane.slopes @ ((start + end) / 2) + plane.heights
                assert between[other] == pytest.approx(between[expert], abs=1e-9)
            else:
                assert np.abs((start + end) / 2).max() == pytest.approx(2)
    assert total == pytest.approx(16)


def test_equal_experts_share_no_region() -> None:
    same = np.ones((3, 2))
    plane = make_plane(same, np.zeros(3), None)
    assert plane.shares.tolist() == [0, 0]
    assert list(make_regions(plane, 1.0)) == [0]
    assert list(make_regions(make_plane(same, np.array([0, 0, 1.0]), None), 1.0)) == [2]
    FigureCanvasAgg(draw_plane(same, np.zeros(3), np.ones((1, 2)))).draw()


@pytest.mark.parametrize("experts", [9, 32, 64, 100])
def test_neighbours_differ_in_colour_and_experts_in_style(experts: int) -> None:
    # On a circle every expert has a region, and the last one is in the middle of all of them.
    angles = np.linspace(0, 2 * np.pi, experts, endpoint=False)
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    rows[-1] = 0
    bias = np.zeros(experts)
    bias[-1] = 0.5
    regions = make_regions(make_plane(rows, bias, None), 2.0)
    assert len(regions) == experts
    styles = make_styles(experts, regions)
    for expert, region in regions.items():
        for other in region.neighbours:
            assert other < 0 or styles[expert].colour != styles[other].colour
    assert len(set(styles)) >= min(experts, 56)


@pytest.mark.parametrize(
    ("experts", "size", "tokens"),
    [(2, 64, 5), (3, 2, 0), (3, 64, 1), (8, 2, 400), (8, 64, 7001), (32, 2, 400), (64, 64, 400)],
)
def test_pictures_of_any_size(experts: int, size: int, tokens: int) -> None:
    rows, bias = arrays(drawn(experts, size))
    x = np.random.default_rng(0).standard_normal((tokens, size)) if tokens else None
    figure = draw_plane(rows, bias, x)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    (axes,) = figure.axes
    assert axes.get_xlim() == axes.get_ylim()
    # Nothing runs out of the picture, and each expert has a number next to its arrow.
    texts = [axes.title, axes.xaxis.label, axes.yaxis.label]
    for box in [text.get_window_extent(renderer) for text in texts]:
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
    frame = axes.get_window_extent(renderer)
    labels = [text for text in axes.texts if text.get_fontweight() == "bold"]
    assert [text.get_text() for text in labels] == [str(expert) for expert in range(experts)]
    boxes = [label.get_window_extent(renderer) for label in labels]
    for box in boxes:
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
    overlapping = sum(a.overlaps(b) for a in boxes for b in boxes) - experts
    assert overlapping <= experts / 8
    dots = sum(len(part.get_offsets()) for part in axes.collections)
    assert dots == (tokens if tokens <= 3000 else 2334)
    assert ("2334 of 7001 tokens" in axes.get_title()) is (tokens == 7001)
    assert len(figure.legends) == (tokens > 0)
    for legend in figure.legends:
        box = legend.get_window_extent(renderer)
        assert frame.x1 < box.x0 < box.x1 <= figure.bbox.x1
        shown = [int(text.get_text()) for text in legend.get_texts()]
        few = x if tokens <= 3000 else x[::3]
        assert shown == sorted(set(np.argmax(few @ rows.T + bias, axis=1).tolist()))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torchmoe.monitor._plane_figure")
    message = r"geometry: plot needs matplotlib: pip install 'torchmoe\[watch\]'"
    with pytest.raises(ImportError, match=message):
        drawn().plot(tmp_path / "plane.png")


@pytest.mark.parametrize(
    ("rows", "bias", "x", "message"),
    [
        ([[1, 2]], None, None, "plot must have two or more experts, got 1"),
        ([[1], [2]], None, None, "plot must have rows of two or more numbers, got 1"),
        (
            [[1, 2], [math.nan, 3]],
            None,
            None,
            "plot must have finite rows and biases, got inf or NaN",
        ),
        ([[1, 2], [4, 3]], [0, math.inf], None, "plot must have finite rows and biases"),
        ([[1, 2], [4, 3]], None, [[0, math.inf]], "plot must have finite x, got inf or NaN"),
    ],
)
def test_errors_of_plot(rows: Any, bias: Any, x: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^geometry: {message}"):
        geometry(gate(rows, bias)).plot(
            tmp_path / "plane.png", None if x is None else torch.tensor(x)
        )
    assert not list(tmp_path.iterdir())
