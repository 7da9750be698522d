"""Following a model: which passes count, what is kept of them, and how it is shown."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from torchmoe.monitor import (
    RoutingStatistics,
    Watcher,
    _intake,
    routing_statistics,
    watch,
)
from torchmoe.monitor._figure import draw_load
from torchmoe.monitor._history import Record
from torchmoe.nn import Capacity, MoE, MoEOutput, Routing, WithAttachedLoss

H, INNER, E, K, T = 6, 7, 5, 2, 23
COUNTS = ("tokens_per_expert", "kept_per_expert")
LAYERS = ("blocks.0.moe", "blocks.1.moe")
EPS = torch.finfo(torch.float64).eps

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """A residual layer, recomputed in the backward pass if it is checkpointed."""

    def __init__(self, checkpointed: str | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(H)
        self.moe = MoE(H, INNER, E, K, capacity=Capacity(0.8))
        self.checkpointed = checkpointed
        self.calls = 0

    def run(self, x: Tensor) -> Tensor:
        self.calls += 1
        # What tanh saves is recomputed last, so that recomputation runs through the whole layer.
        return x + torch.tanh(self.moe(self.norm(x)).hidden_states)

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed is None:
            return self.run(x)
        return checkpoint(self.run, x, use_reentrant=self.checkpointed == "reentrant")


class Model(nn.Module):
    def __init__(self, checkpointed: str | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(H, H)
        self.blocks = nn.ModuleList(Block(checkpointed) for _ in LAYERS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


def step(model: Callable[[Tensor], Tensor], tokens: int = T) -> None:
    model(torch.randn(tokens, H)).square().mean().backward()


def passes(watcher: Watcher) -> dict[str, int]:
    """How many passes of each layer were kept."""
    totals: dict[str, int] = {}
    for record in watcher.to_records():
        totals[record["layer"]] = totals.get(record["layer"], 0) + record["forwards"]
    return totals


def each(count: int) -> dict[str, int]:
    return dict.fromkeys(LAYERS, count) if count else {}


def seen_routings(model: nn.Module) -> dict[str, list[Routing]]:
    """Every routing of each layer, by hooks of the test's own."""
    found: dict[str, list[Routing]] = {name: [] for name in LAYERS}
    for name, routings in found.items():
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, routings=routings: routings.append(output.routing)
        )
    return found


def over_passes(routings: list[Routing]) -> dict[str, Tensor]:
    """Counts summed, the rest means, by definition."""
    each_pass = [routing_statistics(routing) for routing in routings]
    together = {}
    for name in RoutingStatistics._fields:
        stacked = torch.stack([getattr(statistics, name) for statistics in each_pass])
        together[name] = stacked.sum(0) if name in COUNTS else stacked.double().mean(0)
    return together


def check(actual: dict[str, Any], routings: list[Routing]) -> None:
    for name, expected in over_passes(routings).items():
        value = actual[name]
        if torch.is_tensor(value):
            assert value.dtype == expected.dtype
        else:
            assert type(value) is type(expected.tolist())
            value = torch.tensor(value, dtype=expected.dtype)
        if name in COUNTS:
            assert torch.equal(value, expected), name
        else:
            # Sums in another order, of numbers below 20.
            assert_close(value, expected, rtol=0, atol=20 * len(routings) * EPS, msg=name)


# ---- which passes


def wrapped(moe: MoE) -> nn.Module:
    outer = nn.Module()
    outer.module = nn.ModuleDict({"ffn": WithAttachedLoss(moe)})
    return outer


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda moe: moe, ["moe"]),
        (WithAttachedLoss, ["moe"]),
        (wrapped, ["module.ffn.moe"]),
        (lambda moe: nn.Sequential(nn.Identity(), WithAttachedLoss(moe)), ["1.moe"]),
        (lambda moe: nn.Sequential(moe, moe), ["0"]),
        (lambda moe: torch.compile(moe, backend="eager"), ["moe"]),
        (lambda moe: nn.Sequential(torch.compile(WithAttachedLoss(moe))), ["0.moe"]),
    ],
    ids=["itself", "attached", "wrapped", "sequential", "shared", "compiled", "compiled-inside"],
)
def test_finds_and_names_the_layers(build: Callable[[MoE], nn.Module], names: list[str]) -> None:
    moe = MoE(H, INNER, E, K)
    with watch(build(moe)) as watcher:
        moe(torch.randn(T, H))
    assert list(passes(watcher)) == names


def test_collects_what_the_layers_did() -> None:
    model = Model()
    routings = seen_routings(model)
    with watch(model) as watcher:
        for tokens in (T, 5, 0, 11):
            step(model, tokens)
    collected = watcher.collect()
    assert list(collected) == list(LAYERS)
    for name, statistics in collected.items():
        check(statistics._asdict(), routings[name])
    assert not torch.equal(*(collected[name].tokens_per_expert for name in LAYERS))
    assert collected[LAYERS[0]].dropped_share > 0


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch) -> int:
    """Completes passes after so few that tests need not make many."""
    monkeypatch.setattr(_intake, "_MOST_MEASURED", 4 * len(LAYERS))
    return 4


class Unlike(nn.Module):
    """Layers that differ in all that their routings' shapes and dtypes depend on."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((E, K), (E, K), (E, 1), (3, K), (E, K), (E, K))
        self.layers = nn.ModuleList(MoE(H, INNER, experts, k) for experts, k in sizes)
        self.layers[5].double()

    def forward(self, x: Tensor) -> list[Routing]:
        calls = [(x, None)] * 6
        calls[1] = x, torch.rand(len(x)) < 0.7
        calls[4] = x[: len(x) // 2], None
        calls[5] = x.double(), None
        return [
            layer(x, token_mask=mask).routing
            for layer, (x, mask) in zip(self.layers, calls, strict=True)
        ]


def test_layers_that_are_unlike() -> None:
    model = Unlike()
    with watch(model) as watcher:
        routings = [model(torch.randn(tokens, H)) for tokens in (T, 2, T)]
    collected = watcher.collect()
    assert list(collected) == [f"layers.{number}" for number in range(6)]
    for statistics, taken in zip(collected.values(), zip(*routings, strict=True), strict=True):
        check(statistics._asdict(), list(taken))


def test_measurements_wait_in_bounded_number(batch: int) -> None:
    model = Model()
    with watch(model) as watcher:
        for number in range(3 * batch):
            step(model)
            assert len(watcher._intake._measured) == (number + 1) % batch


def test_collect_gives_each_pass_once(batch: int) -> None:
    model = Model()
    routings = seen_routings(model)
    read = []
    counts = (batch - 1, 2 * batch + 3, 0, 1)
    with watch(model) as watcher:
        for count in counts:
            for _ in range(count):
                step(model)
            read.append(watcher.collect())
    assert read[2] == {}
    for name in LAYERS:
        start = 0
        for count, collected in zip(counts, read, strict=True):
            if count:
                check(collected[name]._asdict(), routings[name][start : start + count])
            start += count


def test_a_layer_without_a_pass_is_left_out() -> None:
    model = Model()
    with watch(model) as watcher:
        model.blocks[1](torch.randn(T, H))
    assert list(watcher.collect()) == [LAYERS[1]]
    assert passes(watcher) == {LAYERS[1]: 1}


@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_evaluation(context: Callable[[], Any], evaluation: bool) -> None:
    model = Model()
    routings = seen_routings(model)
    with watch(model, evaluation=evaluation) as watcher:
        step(model)
        model.eval()
        with context():
            model(torch.randn(T, H))
        model.train()
        step(model)
    assert passes(watcher) == each(2 + evaluation)
    for name, statistics in watcher.collect().items():
        taken = routings[name] if evaluation else routings[name][::2]
        check(statistics._asdict(), taken)


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_recomputation_is_no_pass(kind: str) -> None:
    model = Model(kind)
    routings = seen_routings(model)
    with watch(model) as watcher:
        for _ in range(3):
            model(torch.randn(T, H, requires_grad=True)).square().mean().backward()
    collected = watcher.collect()
    for block, name in zip(model.blocks, LAYERS, strict=True):
        # What was to be ignored did happen: each pass twice, in turn.
        assert block.calls == len(routings[name]) == 6
        check(collected[name]._asdict(), routings[name][::2])
    assert passes(watcher) == each(3)


def test_every() -> None:
    model = Model()
    routings = seen_routings(model)
    with watch(model, every=3) as watcher:
        for _ in range(8):
            step(model)
    for name, statistics in watcher.collect().items():
        check(statistics._asdict(), routings[name][::3])
    assert [record["forward"] for record in watcher.to_records()] == 2 * [0, 3, 6]
    assert passes(watcher) == each(3)


def test_two_at_once() -> None:
    model = Model()
    with watch(model) as outer:
        step(model)
        with watch(model, every=2, max_records=2) as inner:
            for _ in range(5):
                step(model)
        step(model)
    assert passes(outer) == each(7)
    assert passes(inner) == each(3)


def test_passes_without_a_counted_token_enter_with_zeros() -> None:
    moe = MoE(H, INNER, E, K)
    with watch(moe) as watcher:
        moe(torch.randn(T, H))
        moe(torch.randn(T, H), token_mask=torch.zeros(T, dtype=torch.bool))
    first, second = watcher.to_records()
    assert all(second[name] == 0 for name in RoutingStatistics._fields[2:])
    assert watcher.collect()["moe"].routing_entropy.item() == first["routing_entropy"] / 2


# ---- under torch.compile


# Where a graph is broken, torch's own tracing looks at .grad of what the first half computed.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize(
    ("entered", "checkpointed"),
    [
        ("before compile", None),
        ("before the first run", None),
        ("after reset", None),
        ("before compile", "reentrant"),
        ("before compile", "non-reentrant"),
    ],
)
def test_every_pass_of_a_compiled_model(entered: str, checkpointed: str | None) -> None:
    model = Model(checkpointed)
    compiled: Callable[[Tensor], Tensor] = model
    if entered != "before compile":
        compiled = torch.compile(model, backend="aot_eager")
    if entered == "after reset":
        step(compiled)
        torch.compiler.reset()
    with watch(model) as watcher:
        compiled = torch.compile(model, backend="aot_eager") if compiled is model else compiled
        for tokens in (T, T, 11, 12):
            step(compiled, tokens)
    assert passes(watcher) == each(4)
    for statistics in watcher.collect().values():
        assert statistics.tokens_per_expert.sum() == K * (2 * T + 11 + 12)
    step(compiled)
    with watch(model) as second:
        step(compiled)
    assert passes(watcher) == each(4)
    assert passes(second) == each(1)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_counting_passes_compiles_nothing() -> None:
    model = nn.Sequential(*(WithAttachedLoss(MoE(H, INNER, E, K)) for _ in range(2)))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    frames = []
    with watch(model) as watcher:
        for _ in range(5):
            step(compiled)
            frames.append(counter.frame_count)
    assert frames == 5 * frames[:1]
    assert set(passes(watcher).values()) == {5}


def test_evaluation_that_is_not_followed_leaves_the_graph_whole() -> None:
    model = Model().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(T, H)
    with watch(model) as watcher:
        assert torch.equal(compiled(x), model(x))
    assert passes(watcher) == {}


def test_export_is_not_followed() -> None:
    model = Model()
    with watch(model) as watcher:
        torch.export.export(model, (torch.randn(T, H),))
        step(model)
    assert passes(watcher) == each(1)


# ---- what is left behind


def test_the_model_is_as_before(tmp_path: Path) -> None:
    model = Model()
    before = copy.deepcopy(model.state_dict())
    keys = {name: sorted(vars(module)) for name, module in model.named_modules()}
    with watch(model):
        model(torch.randn(T, H))
    assert all(not module._forward_hooks for module in model.modules())
    assert keys == {name: sorted(vars(module)) for name, module in model.named_modules()}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_same_numbers_watched_or_not() -> None:
    model = Model()
    x = torch.randn(T, H)
    expected = model(x)
    with watch(model):
        assert torch.equal(model(x), expected)


def test_hooks_go_with_an_exception() -> None:
    model = Model()
    watcher = watch(model)
    with pytest.raises(RuntimeError, match="MoE: x must be"), watcher:
        model.blocks[0].moe(torch.randn(T, H + 1))
    assert all(not module._forward_hooks for module in model.modules())
    step(model)
    assert passes(watcher) == {}


def test_it_goes_on_when_entered_again() -> None:
    model = Model()
    watcher = watch(model)
    step(model)
    for count in (1, 2):
        with watcher:
            step(model)
        assert passes(watcher) == each(count)
    with watcher, pytest.raises(RuntimeError, match=r"watch: watcher must be left .* twice"):
        watcher.__enter__()


def test_copies_are_not_followed() -> None:
    model = Model()
    with watch(model) as watcher:
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            step(other)
        step(model)
    assert passes(watcher) == each(1)


def storages(model: Model) -> dict[str, list[StorageWeakRef]]:
    """Of what the graph holds and of what the first layer's routing has, as passes are made."""
    found: dict[str, list[StorageWeakRef]] = {"graph": [], "routing": []}

    def hook(module: nn.Module, args: tuple[Tensor], output: MoEOutput) -> None:
        for name, tensors in (("graph", args), ("routing", output.routing[:4])):
            found[name] += [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]

    model.blocks[0].moe.register_forward_hook(hook)
    return found


def test_neither_graph_nor_tokens_are_kept() -> None:
    model = Model()
    found = storages(model)
    with watch(model) as watcher:
        for _ in range(3):
            # Without a backward pass, which would free the graph whoever holds it.
            model(torch.randn(T, H))
        assert [len(references) for references in found.values()] == [3, 12]
        assert all(ref.expired() for references in found.values() for ref in references)
        # A pass is some numbers of each expert.
        kept = [tensor for _, measured in watcher._intake._measured for tensor in measured]
        assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == (
            3 * len(LAYERS) * (8 * (2 * E + 3) + 4 * 4)
        )
    assert passes(watcher) == each(3)


def test_a_pass_that_ends_early_keeps_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    found = storages(model)
    with watch(model):
        for _ in range(3):
            model.blocks[0](torch.randn(T, H))
        assert all(reference.expired() for reference in found["graph"])
        # What waits for the other layer is the last pass alone.
        assert [reference.expired() for reference in found["routing"]] == 8 * [True] + 4 * [False]
        monkeypatch.setattr(_intake, "_MOST_LOGITS", T * E - 1)
        model.blocks[0](torch.randn(T, H))
        assert all(reference.expired() for reference in found["routing"])


def test_nothing_waits_for_the_device(batch: int) -> None:
    """A tensor on meta has no data: whatever waited for some would raise."""
    moe = MoE(H, INNER, E, K, capacity=Capacity(1.0), device="meta")
    with watch(moe, max_records=4) as watcher:
        for _ in range(2 * batch + 3):
            moe(torch.randn(T, H, device="meta"))
    statistics = watcher.collect()["moe"]
    assert all(value.is_meta for value in statistics)


# ---- bounded memory


@pytest.mark.parametrize("max_records", [2, 3, 4, 7, 500])
@pytest.mark.parametrize("read_at", [(), (5, 20, 21)])
def test_merged_records_keep_the_sums(
    max_records: int, read_at: tuple[int, ...], batch: int
) -> None:
    count = 9 * batch + 1
    model = Model()
    routings = seen_routings(model)
    with watch(model, max_records=max_records) as watcher:
        for number in range(count):
            model(torch.randn(1 + number % 7, H))
            if number in read_at:
                watcher.to_records()
    for name in LAYERS:
        records = [record for record in watcher.to_records() if record["layer"] == name]
        assert len(records) <= max_records
        assert len(records) > max_records // 2 or len(records) == count
        # One resolution throughout, but for the last, which still fills up.
        sizes = [record["forwards"] for record in records]
        assert set(sizes[:-1]) == {sizes[0]}
        assert sizes[-1] <= sizes[0]
        first = 0
        for record in records:
            assert record["forward"] == first
            end = first + record["forwards"]
            check(
                {name: record[name] for name in RoutingStatistics._fields},
                routings[name][first:end],
            )
            first = end
        assert first == count
    for name, statistics in watcher.collect().items():
        check(statistics._asdict(), routings[name])


# ---- how it is shown


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


# ---- bad input


def test_errors() -> None:
    with pytest.raises(
        ValueError, match=r"watch: model must contain a torchmoe\.nn\.MoE, got Linear"
    ):
        watch(nn.Linear(H, H))
    moe = MoE(H, INNER, E, K)
    with pytest.raises(ValueError, match="watch: every must be >= 1, got 0"):
        watch(moe, every=0)
    with pytest.raises(ValueError, match="watch: max_records must be >= 2, got 1"):
        watch(moe, max_records=1)
    with pytest.raises(TypeError, match=r"watch: every must be an int, got 1\.5"):
        watch(moe, every=1.5)
