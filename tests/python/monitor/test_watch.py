"""Following a model: which passes count, what is kept of them, and how it is shown."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef

from torchmoe.monitor import (
    RoutingStatistics,
    _intake,
    watch,
)
from torchmoe.nn import Capacity, MoE, MoEOutput, Routing, WithAttachedLoss
from watched import (
    INNER,
    LAYERS,
    E,
    H,
    K,
    Model,
    T,
    check,
    each,
    passes,
    seen_routings,
    step,
)

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
    for count in (1, 2):
        with watcher:
            step(model)
        step(model)
        assert passes(watcher) == each(count)
    with watcher, pytest.raises(RuntimeError, match=r"watch: watcher must be left .* twice"):
        watcher.__enter__()


def test_it_follows_from_the_call_on(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model()
    watcher = watch(model)
    step(model)
    assert passes(watcher) == each(1)
    with watcher:
        step(model)
    step(model)
    assert passes(watcher) == each(2)
    watcher.summary()
    assert "no forward pass" not in capsys.readouterr().out


def test_close_stops_it() -> None:
    model = Model()
    watcher = watch(model)
    step(model)
    for _ in range(2):
        watcher.close()
        assert all(not module._forward_hooks for module in model.modules())
    step(model)
    assert passes(watcher) == each(1)


def test_it_stops_when_nobody_holds_it() -> None:
    model = Model()
    watcher = watch(model)
    step(model)
    assert sum(len(module._forward_hooks) for module in model.modules()) == len(LAYERS)
    del watcher
    assert all(not module._forward_hooks for module in model.modules())
    watch(model)
    assert all(not module._forward_hooks for module in model.modules())
    # Nor does it keep the model, which may hold it.
    model.blocks[0].moe.watcher = watch(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


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
        # One resolution throughout, except for the last, which still fills up.
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
