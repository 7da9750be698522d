"""What was watched, as events, records, a table and a map."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import Tensor

from torchmoe.monitor import (
    RoutingStatistics,
    watch,
)
from torchmoe.monitor._figure import draw_load
from torchmoe.monitor._history import Record
from torchmoe.nn import MoE
from watched import (
    EPS,
    INNER,
    LAYERS,
    E,
    H,
    Model,
    T,
    check,
    each,
    over_passes,
    passes,
    seen_routings,
    step,
)


class FakeWriter:
    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}
        self.histograms: dict[tuple[str, int], list[float]] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag, step] = value

    def add_histogram(self, tag: str, values: Tensor, step: int) -> None:
        self.histograms[tag, step] = values.tolist()


def test_log_writes_each_pass_once() -> None:
    model = Model()
    routings = seen_routings(model)
    writer = FakeWriter()
    with watch(model) as watcher:
        for at, count in enumerate((2, 0, 3)):
            for _ in range(count):
                step(model)
            watcher.collect()  # has a position of its own
            watcher.log(writer, 10 * at)
    scalars = RoutingStatistics._fields[2:]
    wanted = {(f"{layer}/{name}", at) for layer in LAYERS for name in scalars for at in (0, 20)}
    assert set(writer.scalars) == wanted
    for layer in LAYERS:
        for at, taken in ((0, routings[layer][:2]), (20, routings[layer][2:])):
            expected = over_passes(taken)
            for name in scalars:
                value = writer.scalars[f"{layer}/{name}", at]
                assert type(value) is float
                assert value == pytest.approx(expected[name].item(), rel=0, abs=60 * EPS)
            load = expected["tokens_per_expert"]
            assert (
                writer.histograms[f"{layer}/load", at] == (load * E / load.sum().double()).tolist()
            )
    assert len(watcher.collect()) == 0


@pytest.fixture
def quiet_tensorboard() -> Iterator[None]:
    """Its reader logs each file that it opens."""
    from tensorboard.util import tb_logging

    logger = tb_logging.get_logger()
    level = logger.level
    logger.setLevel("ERROR")
    yield
    logger.setLevel(level)


@pytest.mark.usefixtures("quiet_tensorboard")
def test_tensorboard_reads_the_log(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = Model()
    with SummaryWriter(tmp_path) as writer, watch(model) as watcher:
        for at in range(3):
            step(model)
            watcher.log(writer, at)
    events = EventAccumulator(str(tmp_path)).Reload()
    records = [record for record in watcher.to_records() if record["layer"] == LAYERS[1]]
    logged = events.Scalars(f"{LAYERS[1]}/max_violation")
    assert [event.step for event in logged] == [0, 1, 2]
    assert [event.value for event in logged] == pytest.approx(
        [record["max_violation"] for record in records], rel=1e-6
    )
    assert events.Histograms(f"{LAYERS[1]}/load")[0].histogram_value.num == E


def test_records_are_plain() -> None:
    model = Model()
    routings = seen_routings(model)
    with watch(model) as watcher:
        for _ in range(3):
            step(model)
    records = watcher.to_records()
    assert json.loads(json.dumps(records)) == records
    assert [(r["layer"], r["forward"], r["forwards"]) for r in records] == [
        (layer, forward, 1) for layer in LAYERS for forward in range(3)
    ]
    for record in records:
        assert tuple(record) == ("layer", "forward", "forwards", *RoutingStatistics._fields)
        taken = routings[record["layer"]][record["forward"]]
        check({name: record[name] for name in RoutingStatistics._fields}, [taken])
    assert watcher.to_records() == records


def cells(text: str, layer: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.strip().startswith(layer))
    return line.split()


def test_summary(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model()
    with watch(model) as watcher:
        for _ in range(4):
            model.blocks[0](torch.randn(T, H))
    mean = watcher.collect()[LAYERS[0]]
    watcher.summary()
    text = capsys.readouterr().out
    head = " ".join(text.split(LAYERS[0])[0].split())
    for word in ("layer", "dropped", "MaxVio", "CV", "entropy", "experts", "weight", "passes"):
        assert word in head
    assert cells(text, LAYERS[0]) == [
        LAYERS[0],
        f"{100 * mean.dropped_share.item():.1f}%",
        "0.0%",
        f"{mean.max_violation.item():.2f}",
        f"{mean.load_cv.item():.2f}",
        f"{100 * mean.load_entropy.item() / math.log(E):.1f}%",
        f"{mean.routing_entropy.item():.2f}",
        f"{mean.dead_experts.item():.1f}/{E}",
        f"{mean.first_choice_weight.item():.2f}",
        f"{mean.logit_range.item():.1f}",
        "4",
    ]
    assert cells(text, LAYERS[1]) == [LAYERS[1], *9 * ["-"], "0"]
    assert mean.dropped_share > 0


def test_summary_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No number and no name is cut, and it says which columns there is no room for."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    model = Model()
    with watch(model) as watcher:
        step(model)
    for width, missing in ((80, "load CV"), (200, None)):
        monkeypatch.setenv("COLUMNS", str(width))
        watcher.summary()
        text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        assert "…" not in text
        assert all(len(line.rstrip()) <= width for line in text.splitlines())
        assert cells(text, LAYERS[0])[0] == LAYERS[0]
        assert ("no room for" in text) == (missing is not None)
        assert missing is None or missing in text


def test_summary_of_a_single_expert(capsys: pytest.CaptureFixture[str]) -> None:
    moe = MoE(H, INNER, 1, 1)
    with watch(moe) as watcher:
        moe(torch.randn(T, H))
    watcher.summary()
    assert cells(capsys.readouterr().out, "moe")[3:8] == ["0.00", "0.00", "-", "0.00", "0.0/1"]


@pytest.mark.parametrize("evaluation", [False, True])
def test_nothing_seen(evaluation: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = Model().eval()
    with watch(model, evaluation=evaluation) as watcher:
        if not evaluation:
            model(torch.randn(T, H))
    watcher.summary()
    text = capsys.readouterr().out
    assert text.startswith("watch: no forward pass was seen")
    assert ("evaluation=True" in text) is not evaluation
    writer = FakeWriter()
    watcher.log(writer, 0)
    assert watcher.collect() == {} == writer.scalars
    assert watcher.to_records() == []
    with pytest.raises(ValueError, match="watch: plot must have a forward pass, got none"):
        watcher.plot(tmp_path / "load.png")
    assert not list(tmp_path.iterdir())


def test_plot(tmp_path: Path) -> None:
    model = Model()
    with watch(model) as watcher:
        for _ in range(5):
            step(model)
    path = tmp_path / "figures" / "load.png"
    watcher.plot(path)
    image = matplotlib.image.imread(path)
    height, width, _ = image.shape
    assert width == 1800
    assert 300 < height < 600
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50
    watcher.plot(str(tmp_path / "load.svg"))
    assert "<svg" in (tmp_path / "load.svg").read_text()


def records_of(loads: list[list[int]], forwards: int = 1) -> tuple[list[Record], int]:
    """Records with these loads, and how many passes they are."""
    rest = torch.zeros(len(loads[0]) + 9)
    records = [
        Record(i * forwards, forwards, torch.cat([torch.tensor(load), rest]).double())
        for i, load in enumerate(loads)
    ]
    return records, forwards * len(loads)


def test_the_map_shows_doublings_of_the_even_share() -> None:
    records, _ = records_of([[1, 1, 1, 1], [8, 4, 2, 2], [0, 0, 0, 0], [0, 6, 1, 1]], forwards=3)
    figure = draw_load({"a": (records, 14)})
    axes = figure.axes[0]
    assert axes.get_title() == "a"
    assert axes.get_xlim() == (0, 14)
    (image,) = axes.images
    shown = image.get_array()
    assert shown[:, 0].tolist() == [0, 0, 0, 0]
    assert shown[:, 1].tolist() == [1, 0, -1, -1]
    assert shown.mask[:, 2].all()
    low, high = image.get_clim()
    # A load of 0 lies below the scale, where the colour is black.
    assert shown[0, 3] < low
    assert image.to_rgba(shown)[0, 3].tolist() == [0, 0, 0, 1]
    assert shown[1, 3] == pytest.approx(math.log2(3))
    assert high == 2


@pytest.mark.parametrize(
    ("layers", "experts"), [(1, 4), (1, 256), (2, 8), (5, 16), (12, 64), (48, 256)]
)
def test_figures_of_any_size(layers: int, experts: int) -> None:
    loads = torch.randint(1, 50, (9, experts)).tolist()
    names = [f"model.decoder.layers.{layer}.feed_forward.moe" for layer in range(layers)]
    figure = draw_load({name: records_of(loads) for name in names})
    width, height = figure.get_size_inches()
    assert 9 <= width <= 12
    assert 1.5 <= height <= 18
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    maps = [axes for axes in figure.axes if axes.images]
    assert len(maps) == layers
    # All of it is readable: nothing outside the figure, and no title runs into its neighbour.
    renderer = canvas.get_renderer()
    boxes = [axes.title.get_window_extent(renderer) for axes in maps]
    for axes, box in zip(maps, boxes, strict=True):
        assert box.y1 <= figure.bbox.y1
        assert sum(box.overlaps(other) for other in boxes) == 1
        pixels = axes.get_window_extent(renderer).height
        assert pixels >= experts
        assert axes.title.get_text().endswith("moe")
    bar = next(axes for axes in figure.axes if not axes.images and axes.get_ylabel())
    label = bar.yaxis.label.get_window_extent(renderer)
    assert figure.bbox.x1 >= label.x1
    assert label.y0 >= 0
    assert label.y1 <= figure.bbox.y1


def test_many_passes_are_drawn_in_groups() -> None:
    records, seen = records_of([[1, 3]] * 256 + [[3, 1]] * 256 + [[2, 2]])
    (image,) = draw_load({"a": (records, seen)}).axes[0].images
    shown = image.get_array()
    assert shown.shape == (2, 171)  # groups of three
    assert shown[:, 0].tolist() == pytest.approx([-1, math.log2(1.5)])
    # 513 passes end with [3, 1], [3, 1], [2, 2].
    assert shown[:, -1].tolist() == pytest.approx([math.log2(4 / 3), math.log2(2 / 3)])


@pytest.mark.parametrize(
    ("method", "package", "module"),
    [("summary", "rich", "_table"), ("plot", "matplotlib", "_figure")],
)
def test_a_missing_package_is_named(
    method: str, package: str, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"torchmoe.monitor.{module}", raising=False)
    model = Model()
    with watch(model) as watcher:
        step(model)
    message = rf"watch: {method} needs {package}: pip install 'torchmoe\[watch\]'"
    with pytest.raises(ImportError, match=message):
        getattr(watcher, method)(*([tmp_path / "load.png"] if method == "plot" else []))
    assert passes(watcher) == each(1)
