"""Records: the sums they are made of, and how they get to the disk and back."""

from __future__ import annotations

import errno
import json
import math
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest
import torch
from torch import Tensor

import torchmoe
from torchmoe import Watcher
from train_lm import ByteLM
from training import metrics
from training.checkpoint import Progress
from training.evaluation import evaluate
from training.language_model import LMOutput
from training.metrics import Meter, Metrics, Record, Step
from training.parallel import Processes
from training.run_folder import FolderError, RunFolder
from training.settings import Settings

RECORD = Record(
    step=1,
    seconds=1.5,
    training_seconds=1.25,
    bytes=256,
    loss=7.9,
    domain_loss={"notes": 7.8, "sums.txt": 8.0},
    lr=0.001,
    gradient_norm=0.5,
    tokens_per_second=204.8,
    balance=[1.5, 1.0],
    max_violation=[0.5, 0.25],
    dropped=[0.25, 0.0],
    rerouted=[0.0, 0.125],
    dead=[0, 1],
    load=[[0.75, 0.25], [0.5, 0.5]],
    held_out={"notes": 7.5},
)
NO_EXPERTS: dict[str, Any] = {name: [] for name in metrics.EXPERT_FIELDS}
DENSE = replace(RECORD, **NO_EXPERTS, held_out={})


def records(*steps: int, loss: float = 1.0) -> list[Record]:
    return [replace(RECORD, step=step, loss=loss + step) for step in steps]


def routing(balance: float) -> Any:
    """What the meter reads of a layer's routing."""
    return SimpleNamespace(
        losses={"load_balancing_loss": torch.tensor(balance, requires_grad=True)}
    )


def layer(wanted: list[int], *shares: float) -> Any:
    """What the meter reads of a layer's statistics: MaxVio, dropped, rerouted."""
    names = ("max_violation", "dropped_share", "rerouted_share")
    means = (torch.tensor(share, dtype=torch.float64) for share in shares)
    return SimpleNamespace(
        tokens_per_expert=torch.tensor(wanted), **dict(zip(names, means, strict=True))
    )


class Seen(Watcher):
    """Gives the statistics of some records, one after another, instead of following a model."""

    def __init__(self, *records: list[Any]) -> None:
        self.records = iter(records)

    def collect(self) -> dict[str, Any]:
        return {f"blocks.{number}": one for number, one in enumerate(next(self.records))}


def step(losses: list[float], domains: list[int], routings: list[Any], norm: float) -> Step:
    """A step with windows of four bytes."""
    output = LMOutput(torch.zeros(len(losses), 4, 256), torch.zeros(()), routings)
    return Step(torch.tensor(losses), torch.tensor(domains), output, torch.tensor(norm))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "lm")
    folder.make()
    return folder


def refuse(text: str) -> NoReturn:
    raise AssertionError(text)


# ---- the meter


def test_meter_sums_what_was_added() -> None:
    progress = Progress(training_seconds=10.0, saving_seconds=1.0)
    seen = Seen([layer([4, 0, 3, 1], 1.25, 0.25, 0.125)])
    meter = Meter(["a", "b", "c"], progress, Processes(), seen)
    meter.add(step([1.0, 2.0, 6.0], [0, 0, 1], [routing(1.0)], 0.5))
    meter.add(step([3.0], [0], [routing(2.0)], 1.5))
    progress.step, progress.bytes = 2, 16
    progress.training_seconds += 2.0
    record = meter.record(0.25)
    bit = math.log(2)
    assert record == Record(
        step=2,
        seconds=13.0,
        training_seconds=12.0,
        bytes=16,
        loss=pytest.approx(12 / 4 / bit),  # over windows, not over domains or steps
        domain_loss={"a": pytest.approx(6 / 3 / bit), "b": pytest.approx(6 / bit)},  # c had none
        lr=0.25,
        gradient_norm=1.0,
        tokens_per_second=16 / 2.0,
        balance=[1.5],
        max_violation=[1.25],
        dropped=[0.25],
        rerouted=[0.125],
        dead=[1],
        load=[[0.5, 0.0, 0.375, 0.125]],
        held_out={},
    )


def test_meter_keeps_layers_apart() -> None:
    seen = Seen([layer([4, 0, 0, 0], 3.0, 0.75, 0.0), layer([1, 1, 1, 1], 0.0, 0.0, 0.5)])
    meter = Meter(["a"], progress := Progress(), Processes(), seen)
    meter.add(step([1.0], [0], [routing(1.0), routing(2.0)], 1.0))
    progress.training_seconds = 1.0
    record = meter.record(0.1)
    assert record.balance == [1.0, 2.0]
    assert record.max_violation == [3.0, 0.0]
    assert record.dropped == [0.75, 0.0]
    assert record.rerouted == [0.0, 0.5]
    assert record.dead == [3, 0]
    assert record.load == [[1.0, 0.0, 0.0, 0.0], [0.25] * 4]


def test_record_starts_anew() -> None:
    early, late = [layer([8, 0], 1.0, 1.0, 0.0)], [layer([4, 4], 0.0, 0.0, 0.25)]
    meter = Meter(["a", "b"], progress := Progress(), Processes(), Seen(early, late))
    first = step([8.0, 8.0], [0, 1], [routing(4.0)], 9.0)
    second = step([1.0, 3.0], [1, 1], [routing(1.0)], 1.0)
    meter.add(first)
    progress.training_seconds += 1.0
    meter.record(0.1)
    meter.add(second)
    progress.training_seconds += 4.0
    fresh = Meter(["a", "b"], other := Progress(), Processes(), Seen(late))
    fresh.add(second)
    other.training_seconds += 4.0
    assert meter.record(0.2) == replace(fresh.record(0.2), seconds=5.0, training_seconds=5.0)


def test_dense_model_has_no_experts_in_its_record() -> None:
    meter = Meter(["a"], progress := Progress(), Processes(), None)
    meter.add(step([1.0, 2.0], [0, 0], [], 1.0))
    progress.training_seconds = 1.0
    record = meter.record(0.1)
    assert {name: getattr(record, name) for name in NO_EXPERTS} == NO_EXPERTS
    assert "NaN" not in metrics.to_line(record)
    assert record.loss == pytest.approx(1.5 / math.log(2))


class Twins(Processes):
    """Two processes that do the very same."""

    def sum(self, values: Tensor) -> Tensor:
        return 2 * values


def test_meter_counts_all_processes() -> None:
    seen = []
    for processes in (Processes(), Twins(rank=0, count=2)):
        watcher = Seen([layer([3, 5, 0], 0.5, 0.125, 0.25)])
        meter = Meter(["a", "b"], progress := Progress(), processes, watcher)
        meter.add(step([1.0, 5.0], [0, 1], [routing(1.5)], 0.5))
        meter.add(step([2.0, 4.0], [0, 1], [routing(1.0)], 0.5))
        progress.training_seconds = 2.0
        seen.append(meter.record(0.1))
    alone, twins = seen
    assert twins == replace(alone, tokens_per_second=2 * alone.tokens_per_second)


@pytest.mark.parametrize("overflow", ["drop", "next_best"])
def test_meter_reads_what_the_model_gives(overflow: str) -> None:
    settings = Settings(
        layers=2,
        hidden_size=32,
        intermediate_size=8,
        experts=4,
        capacity_factor=0.5,
        overflow=overflow,
        context=16,
    )
    model = ByteLM(settings.model())
    watcher = torchmoe.watch(model)
    meter = Meter(["a", "b"], progress := Progress(), Processes(), watcher)
    wanted, kept = torch.zeros(2, 4), torch.zeros(2, 4)
    violation, rerouted = torch.zeros(2), torch.zeros(2)
    with watcher:
        for _ in range(3):
            text = torch.randint(256, (4, 17))
            evaluate(model, text, rows=2)  # held-out tests come between steps and do not count
            output = model(text[:, :-1])
            losses = model.loss_per_row(output.logits, text[:, 1:]).detach()
            meter.add(Step(losses, torch.tensor([0, 1, 0, 1]), output, torch.tensor(1.0)))
            loads = torch.stack([one.tokens_per_expert for one in output.routings])
            wanted += loads
            kept += torch.stack([one.kept_per_expert for one in output.routings])
            violation += loads.max(1).values * 4 / loads.sum(1) - 1
            moved = [(r.indices >= 0) & (r.indices != r.selected) for r in output.routings]
            rerouted += torch.stack([slots.sum() for slots in moved])
    progress.training_seconds = 2.0
    record = meter.record(0.1)
    assert record.loss == pytest.approx(8.0)  # a new model gives every byte the same odds
    assert record.domain_loss == {"a": pytest.approx(8.0), "b": pytest.approx(8.0)}
    assert record.tokens_per_second == 3 * 4 * 16 / 2.0
    assert torch.tensor(record.load).tolist() == (wanted / wanted.sum(1, keepdim=True)).tolist()
    assert record.dropped == pytest.approx((1 - kept.sum(1) / wanted.sum(1)).tolist())
    assert all(share >= 0.5 for share in record.dropped)
    assert record.rerouted == pytest.approx((rerouted / wanted.sum(1)).tolist())
    assert all((share > 0) == (overflow == "next_best") for share in record.rerouted)
    assert record.max_violation == pytest.approx((violation / 3).tolist())
    assert record.dead == (wanted == 0).sum(1).tolist()
    assert all(balance >= 0.99 for balance in record.balance)


# ---- JSON lines


def test_records_come_back(folder: RunFolder) -> None:
    assert metrics.read(folder) == []
    written = [RECORD, DENSE, replace(RECORD, step=3, domain_loss={"läufe \u2028\n": 1 / 3})]
    with closing(Metrics(folder, 0, refuse, None)) as file:
        for number, record in enumerate(written, 1):
            file.write(record)
            assert metrics.read(folder) == written[:number]  # each is there at once
    assert metrics.read(folder) == written
    lines = folder.metrics.read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [record.loss for record in written]


def test_resumed_run_keeps_records_up_to_its_step(folder: RunFolder) -> None:
    with closing(Metrics(folder, 0, refuse, None)) as file:
        for record in records(10, 20, 30, 40):
            file.write(record)
    with folder.metrics.open("a") as torn:
        torn.write('{"step": 25, "lo')
    with closing(Metrics(folder, 30, refuse, None)) as file:
        assert metrics.read(folder) == records(10, 20, 30)
        for record in records(40, 50, loss=2.0):
            file.write(record)
    assert metrics.read(folder) == [*records(10, 20, 30), *records(40, 50, loss=2.0)]
    assert folder.metrics.read_text().count("\n") == 5


def test_read_leaves_torn_lines_out(folder: RunFolder) -> None:
    whole = "".join(map(metrics.to_line, records(1, 2)))
    first = whole.index("\n") + 1
    for cut in range(len(whole) + 1):
        folder.metrics.write_text(whole[:cut])
        read = metrics.read(folder)
        complete = (cut >= first - 1) + (cut >= len(whole) - 1)  # the end of line may be missing
        assert read == records(1, 2)[:complete]
    # What a disk that was full for a while leaves, and a machine that lost its power.
    folder.metrics.write_bytes(whole[:50].encode() + whole.encode() + b"\0\xff" * 100 + b"\n")
    assert metrics.read(folder) == records(2)


def test_records_of_another_version_are_one_line(folder: RunFolder) -> None:
    fields = json.loads(metrics.to_line(RECORD))
    del fields["rerouted"]
    folder.metrics.write_text(json.dumps(fields) + "\n")
    with pytest.raises(FolderError, match=r"^--out: .*/metrics\.jsonl is of another version of "):
        metrics.read(folder)


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_metrics_that_cannot_be_written_are_one_line(name: str, folder: RunFolder) -> None:
    if name == "tensorboard":
        folder.tensorboard.touch()
    else:
        (folder.path / "metrics.jsonl.unfinished").mkdir()
    with pytest.raises(FolderError, match=r"^--out: cannot write to .*/lm: \w+ .*$"):
        Metrics(folder, 0, refuse, None)


# ---- a disk that is full


class FullDisk:
    """Where all that is written is refused."""

    def write(self, *_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    flush = close = add_scalar = write


def test_a_full_disk_costs_records_not_the_run(folder: RunFolder) -> None:
    warnings: list[str] = []
    file = Metrics(folder, 0, warnings.append, None)
    file.write(records(1)[0])
    whole, file.file = file.file, cast(Any, FullDisk())
    file.write(records(2)[0])
    file.write(records(3)[0])
    assert warnings == [
        "no metrics from step 2 on: No space left on device",
    ]
    file.file = whole  # somebody made room
    file.write(records(4)[0])
    file.file = cast(Any, FullDisk())
    file.write(records(5)[0])
    assert warnings[1:] == ["no metrics from step 5 on: No space left on device"]
    file.file = whole
    file.close()
    assert metrics.read(folder) == records(1, 4)


def test_a_disk_that_is_full_at_the_end(folder: RunFolder) -> None:
    warnings: list[str] = []
    file = Metrics(folder, 0, warnings.append, None)
    file.file.close()
    file.file = Path("/dev/full").open("a")  # noqa: SIM115  # it is the one that is tested
    file.write(RECORD)
    file.close()
    assert warnings == [
        "no metrics from step 1 on: No space left on device",
        "the last metrics are not written: No space left on device",
    ]
    # The events went elsewhere, and they are whole.
    assert events(folder)["loss/train"] == [(1, pytest.approx(7.9))]


def test_events_end_where_their_disk_is_full(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[object] = []  # what would be printed about a thread
    monkeypatch.setattr(threading, "excepthook", ended.append)
    warnings: list[str] = []
    file = Metrics(folder, 0, warnings.append, None)
    assert file.events is not None
    writer = file.events._get_file_writer().event_writer._async_writer
    monkeypatch.setattr(writer._writer, "write", FullDisk().write)
    for record in records(*range(1, 6)):
        file.write(record)
        writer._worker.join(0.2)
    file.close()
    assert warnings == ["no TensorBoard events from here on: No space left on device"]
    assert metrics.read(folder) == records(*range(1, 6))
    assert ended == []
    assert threading.excepthook == ended.append


def test_another_thread_that_ends_is_told_as_ever(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", ended.append)
    file = Metrics(folder, 0, refuse, None)
    thread = threading.Thread(target=FullDisk().write)
    thread.start()
    thread.join()
    file.close()
    assert [args.thread for args in ended] == [thread]


def test_events_that_fail_at_the_end_are_a_warning(folder: RunFolder) -> None:
    warnings: list[str] = []
    file = Metrics(folder, 0, warnings.append, None)
    assert file.events is not None
    file.events.close()
    file.events = cast(Any, FullDisk())
    file.close()
    assert warnings == ["the last metrics are not written: No space left on device"]
    assert file.file.closed


# ---- TensorBoard


def events(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """Step and value by tag, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder.tensorboard), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


@pytest.fixture
def quiet_tensorboard() -> Iterator[None]:
    """It logs what it drops of the first try of a step."""
    from tensorboard.util import tb_logging

    logger = tb_logging.get_logger()
    before, logger.disabled = logger.disabled, True
    yield
    logger.disabled = before


def test_tensorboard_reads_the_events(folder: RunFolder) -> None:
    with closing(Metrics(folder, 0, refuse, None)) as file:
        file.write(RECORD)
        file.write(replace(DENSE, step=2, loss=7.0))
    values = {
        "loss/train": [(1, 7.9), (2, 7.0)],
        "loss/notes": [(1, 7.8), (2, 7.8)],
        "loss/sums.txt": [(1, 8.0), (2, 8.0)],
        "held_out/notes": [(1, 7.5)],
        "optimizer/lr": [(1, 0.001), (2, 0.001)],
        "optimizer/gradient_norm": [(1, 0.5), (2, 0.5)],
        "speed/bytes_per_second": [(1, 204.8), (2, 204.8)],
        "balance/layer_0": [(1, 1.5)],
        "balance/layer_1": [(1, 1.0)],
    }
    read = events(folder)
    assert read.keys() == values.keys()
    for tag, expected in values.items():
        assert [step for step, _ in read[tag]] == [step for step, _ in expected]
        assert [value for _, value in read[tag]] == pytest.approx([v for _, v in expected])


def test_the_watcher_writes_beside_the_records(folder: RunFolder) -> None:
    settings = Settings(layers=2, hidden_size=32, intermediate_size=8, experts=4, context=16)
    model = ByteLM(settings.model())
    watcher = torchmoe.watch(model)
    with closing(Metrics(folder, 0, refuse, watcher)) as file, watcher:
        for record in records(10, 20):
            loads = model(torch.randint(256, (4, 16))).routings[1].tokens_per_expert
            file.write(record)
    steps = {tag: [step for step, _ in values] for tag, values in events(folder).items()}
    for layer in ("blocks.0.feed_forward", "blocks.1.feed_forward"):
        for name in ("dropped_share", "rerouted_share", "max_violation", "dead_experts"):
            assert steps[f"{layer}/{name}"] == [10, 20]
    assert events(folder)["blocks.1.feed_forward/max_violation"][1][1] == pytest.approx(
        float(loads.max() * 4 / loads.sum() - 1)
    )


@pytest.mark.usefixtures("quiet_tensorboard")
def test_tensorboard_shows_the_second_try_of_a_step(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.summary.writer import event_file_writer

    # Files of one process and second are read in the order of a number, and 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    for start, steps, loss in ((0, (10, 20, 30, 40), 1.0), (20, (30, 40, 50), 2.0)):
        with closing(Metrics(folder, start, refuse, None)) as file:
            for record in records(*steps, loss=loss):
                file.write(record)
    assert events(folder)["loss/train"] == [(10, 11.0), (20, 21.0), (30, 32), (40, 42), (50, 52)]
