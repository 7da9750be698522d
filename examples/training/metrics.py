"""What a run tells about itself while it trains: records, as JSON lines and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from torchmoe import Watcher
from training import run_folder
from training.checkpoint import Progress
from training.language_model import LMOutput, bits
from training.parallel import Processes
from training.run_folder import FolderError, RunFolder

FLUSH_SECONDS = 10  # until TensorBoard sees a record
# The fields of a record that are empty for a dense model.
EXPERT_FIELDS = ("balance", "max_violation", "dropped", "rerouted", "dead", "load")


@dataclass(frozen=True)
class Record:
    """The steps since the record before; one number per layer where a list, none if dense."""

    step: int
    """Optimizer steps in all."""
    seconds: float
    """Time since the start of the run."""
    training_seconds: float
    """That time without display, metrics, checkpoints and held-out tests."""
    bytes: int
    """Bytes trained on since the start of the run."""
    loss: float
    """Bits per byte of training text."""
    domain_loss: dict[str, float]
    """The same by domain."""
    lr: float
    """Learning rate of the last step."""
    gradient_norm: float
    """Mean norm of the gradient before it is clipped."""
    tokens_per_second: float
    """Bytes trained on per second of training."""
    balance: list[float]
    """Load-balancing loss, 1 where the experts share evenly."""
    max_violation: list[float]
    """The busiest expert's load over the mean load, less 1: the mean of steps and processes."""
    dropped: list[float]
    """Share of the slots that no expert had room for."""
    rerouted: list[float]
    """Share of the slots that went to another expert than the router's choice."""
    dead: list[int]
    """How many experts no slot chose."""
    load: list[list[float]]
    """Each expert's share of the slots, before any is dropped."""
    held_out: dict[str, float] = field(default_factory=dict)
    """Bits per byte of some held-out text by domain, empty in most records."""


class Step(NamedTuple):
    """One optimizer step of one process."""

    losses: Tensor
    """[B], nats per byte of each window, without gradient."""
    domains: Tensor
    """[B] int64, the number of each window's domain."""
    output: LMOutput
    gradient_norm: Tensor
    """Before it is clipped."""


class Meter:
    """Keeps the numbers of some steps where the model computes; only `record` waits for them."""

    def __init__(
        self,
        domains: list[str],
        progress: Progress,
        processes: Processes,
        watcher: Watcher | None,
    ) -> None:
        """Starts at zero.

        Args:
            domains: their names.
            progress: the run's own, which moves on.
            processes: those that train.
            watcher: follows the model's experts, None where there are none.
        """
        self.domains = domains
        self.progress = progress
        self.processes = processes
        self.watcher = watcher
        self.clear()

    def clear(self) -> None:
        """Forgets what was added."""
        self.since = self.progress.training_seconds
        self.tokens = 0
        # Of each step. To add them up at each would take longer.
        self.losses: list[Tensor] = []
        self.windows: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.balance: list[list[Tensor]] = []

    def add(self, step: Step) -> None:
        """Counts one step of this process."""
        self.tokens += self.processes.count * step.output.logits.shape[:2].numel()
        self.losses.append(step.losses)
        self.windows.append(step.domains)
        self.norms.append(step.gradient_norm)
        self.balance.append(
            [routing.losses["load_balancing_loss"].detach() for routing in step.output.routings]
        )

    def record(self, lr: float) -> Record:
        """The steps since the last record, of all processes; the next one starts anew."""
        losses = torch.cat(self.losses)  # [N] windows
        one_hot = functional.one_hot(torch.cat(self.windows), len(self.domains))  # [N, D]
        nats = self.processes.sum(losses @ one_hot.to(losses.dtype))  # [D]
        rows = self.processes.sum(one_hot.sum(dim=0))  # [D]
        progress = self.progress
        record = Record(
            step=progress.step,
            seconds=round(progress.seconds, 3),
            training_seconds=round(progress.training_seconds, 3),
            bytes=progress.bytes,
            loss=bits(float(nats.sum() / rows.sum())),
            domain_loss={
                name: bits(float(n / r))
                for name, n, r in zip(self.domains, nats, rows, strict=True)
                if r > 0
            },
            lr=lr,
            gradient_norm=float(torch.stack(self.norms).mean()),
            tokens_per_second=round(self.tokens / (progress.training_seconds - self.since), 1),
            **self.experts(),
        )
        self.clear()
        return record

    def experts(self) -> dict[str, Any]:
        """EXPERT_FIELDS of the steps since the last record, of all processes."""
        if self.watcher is None:
            return {name: [] for name in EXPERT_FIELDS}
        layers = self.watcher.collect().values()
        balance = torch.stack([torch.stack(losses) for losses in self.balance])  # [steps, L]
        means = [balance.double().mean(dim=0)]  # over the steps of this process, [L] each
        for name in ("max_violation", "dropped_share", "rerouted_share"):
            means.append(torch.stack([getattr(layer, name) for layer in layers]))
        # Each process has as many slots.
        shared = self.processes.sum(torch.stack(means)) / self.processes.count  # [4, L]
        counts = self.processes.sum(torch.stack([layer.tokens_per_expert for layer in layers]))
        dead = (counts == 0).sum(dim=1)  # [L]
        load = counts / counts.sum(dim=1, keepdim=True)  # [L, E]
        values = (*shared.tolist(), dead.tolist(), load.tolist())
        return dict(zip(EXPERT_FIELDS, values, strict=True))


class Metrics:
    """Writes records to metrics.jsonl and as TensorBoard events, each as it comes.

    A disk that is full costs records, not the run.
    """

    def __init__(
        self,
        folder: RunFolder,
        step: int,
        warn: Callable[[str], None],
        watcher: Watcher | None,
    ) -> None:
        """Keeps what a resumed run wrote up to `step`; it does the later steps again.

        Args:
            folder: of the run.
            step: where the run goes on.
            warn: is told what cannot be written.
            watcher: writes events of its own about the experts of this process.
        """
        # It imports for two seconds, which no other use of this program should wait for.
        from torch.utils.tensorboard import SummaryWriter

        self.warn = warn
        self.watcher = watcher
        self.lost = False  # whether the last record did not reach the file
        kept = [record for record in read(folder) if record.step <= step]
        self.events: SummaryWriter | None
        try:
            run_folder.write(folder.metrics, (to_line(record).encode() for record in kept))
            self.events = SummaryWriter(
                folder.tensorboard, purge_step=step + 1, flush_secs=FLUSH_SECONDS
            )
            self.file = folder.metrics.open("a")
        except OSError as error:
            raise folder.unwritable(error) from error
        self.former_hook = threading.excepthook
        threading.excepthook = self.thread_ended

    def thread_ended(self, ended: threading.ExceptHookArgs) -> None:
        """Prints no traceback for the thread that writes the events: `write` tells of its end."""
        module = type(ended.thread).__module__
        if not (module.startswith("tensorboard.") and isinstance(ended.exc_value, OSError)):
            self.former_hook(ended)

    def write(self, record: Record) -> None:
        """Appends one record."""
        try:
            self.file.write(to_line(record))
            self.file.flush()
            self.lost = False
        except OSError as error:
            if not self.lost:
                self.warn(f"no metrics from step {record.step} on: {error.strerror}")
            self.lost = True
        if self.events is not None:
            try:
                for name, value in scalars(record):
                    self.events.add_scalar(name, value, record.step)
                if self.watcher is not None:
                    self.watcher.log(self.events, record.step)
            except OSError as error:
                # What writes the events is a thread, which has ended with this error.
                self.events = None
                self.warn(f"no TensorBoard events from here on: {error.strerror}")

    def close(self) -> None:
        """Lets the last records reach the disk."""
        for part in (self.file, self.events):
            try:
                if part is not None:
                    part.close()
            except OSError as error:
                self.warn(f"the last metrics are not written: {error.strerror}")
        threading.excepthook = self.former_hook


def to_line(record: Record) -> str:
    """One line of JSON."""
    return json.dumps(asdict(record)) + "\n"


def read(folder: RunFolder) -> list[Record]:
    """The records of a run, but for lines that a killed process or a full disk left torn.

    Raises:
        FolderError: they have other fields than a record of this program.
    """
    records = []
    for line in folder.metrics.read_bytes().splitlines() if folder.metrics.exists() else ():
        with contextlib.suppress(ValueError):  # not JSON
            values = json.loads(line)
            try:
                records.append(Record(**values))
            except TypeError as error:
                raise FolderError(
                    f"--out: {folder.metrics} is of another version of this program"
                ) from error
    return records


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """What TensorBoard shows, besides what the watcher writes about the experts."""
    yield "loss/train", record.loss
    yield from ((f"loss/{name}", loss) for name, loss in record.domain_loss.items())
    yield from ((f"held_out/{name}", loss) for name, loss in record.held_out.items())
    yield "optimizer/lr", record.lr
    yield "optimizer/gradient_norm", record.gradient_norm
    yield "speed/bytes_per_second", record.tokens_per_second
    yield from ((f"balance/layer_{layer}", loss) for layer, loss in enumerate(record.balance))
