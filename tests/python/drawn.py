"""Records of a run to draw, and what every figure's files must be."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from training import figures

DOMAINS = ("python", "english", "cpp")


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


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def check_files(make: Callable[[], Figure], name: str, tmp_path: Path) -> None:
    """They are whole, the same every time, and nothing of matplotlib's settings is changed."""
    settings = dict(matplotlib.rcParams)
    figure = make()
    first = figures.save(figure, tmp_path / "new" / "folder", name)
    assert first == tuple(tmp_path / "new" / "folder" / f"{name}.{end}" for end in ("png", "svg"))
    torch.manual_seed(0)  # the test's start, so that the figure made anew has the same experts
    for again in (figure, make()):
        for before, after in zip(first, figures.save(again, tmp_path, name), strict=True):
            assert before.read_bytes() == after.read_bytes()
    picture = imread(first[0])
    assert picture.shape[1] <= figures.WIDTH * figures.DPI
    assert picture[..., :3].std() > 0.02  # not blank
    assert len(ElementTree.parse(first[1]).findall(".//{*}path")) > 20
    assert dict(matplotlib.rcParams) == settings


def check_nothing_is_hidden(figure: Figure) -> None:
    """Panels and legend lie side by side and inside."""
    figure.draw_without_rendering()
    (legend,) = figure.legends
    boxes = [legend.get_window_extent(), *(axes.get_tightbbox() for axes in figure.axes)]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
