"""What a run tells about itself while it trains: records, as JSON lines and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lm import run_folder
from lm.checkpoint import Progress
from lm.model import LMOutput, bits
from lm.parallel import Processes
from lm.run_folder import RunFolder

FLUSH_SECONDS = 10  # until TensorBoard sees a record


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
    dropped: list[float]
    """Share of the slots that no expert had room for."""
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
    """Sums up steps where the model computes; only `record` waits for the numbers."""

    def __init__(self, domains: list[str], progress: Progress, processes: Processes) -> None:
        """Starts at zero; `progress` is the run's own, which moves on."""
        self.domains = domains
        self.progress = progress
        self.processes = processes
        self.clear()

    def clear(self) -> None:
        """Forgets what was added."""
        self.since = self.progress.training_seconds
        self.steps = self.tokens = 0
        # Scalars that take the shape of what is added to them.
        self.nats = self.rows = self.norms = self.balance = torch.zeros(())
        self.wanted = self.kept = torch.zeros((), dtype=torch.int64)

    def add(self, step: Step) -> None:
        """Counts one step of this process."""
        one_hot = functional.one_hot(step.domains, len(self.domains))  # [B, D]
        self.steps += 1
        self.tokens += self.processes.count * step.output.logits.shape[:2].numel()
        self.nats = self.nats + step.losses @ one_hot.to(step.losses.dtype)  # [D]
        self.rows = self.rows + one_hot.sum(dim=0)  # [D]
        self.norms = self.norms + step.gradient_norm
        if routings := step.output.routings:
            balance = [routing.losses["load_balancing_loss"].detach() for routing in routings]
            self.balance = self.balance + torch.stack(balance)  # [L]
            self.wanted = self.wanted + torch.stack([r.tokens_per_expert for r in routings])
            self.kept = self.kept + torch.stack([r.kept_per_expert for r in routings])  # [L, E]

    def record(self, lr: float) -> Record:
        """The steps since the last record, of all processes; the next one starts anew."""
        nats, rows = self.processes.sum(self.nats), self.processes.sum(self.rows)
        balance = self.processes.sum(self.balance) / (self.steps * self.processes.count)
        wanted, kept = self.processes.sum(self.wanted), self.processes.sum(self.kept)
        is_dense = wanted.dim() == 0
        load = wanted / wanted.sum(dim=-1, keepdim=True)  # [L, E]
        dropped = 1 - kept.sum(dim=-1) / wanted.sum(dim=-1)  # [L]
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
            gradient_norm=float(self.norms) / self.steps,
            tokens_per_second=round(self.tokens / (progress.training_seconds - self.since), 1),
            balance=[] if is_dense else balance.tolist(),
            dropped=[] if is_dense else dropped.tolist(),
            load=[] if is_dense else load.tolist(),
        )
        self.clear()
        return record


class Metrics:
    """Writes records to metrics.jsonl and as TensorBoard events, each as it comes.

    A disk that is full costs records, not the run.
    """

    def __init__(self, folder: RunFolder, step: int, warn: Callable[[str], None]) -> None:
        """Keeps what a resumed run wrote up to `step`; it does the later steps again."""
        # It imports for two seconds, which no other use of this program should wait for.
        from torch.utils.tensorboard import SummaryWriter

        self.warn = warn
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

    def write(self, record: Record) -> None:
        """Appends one record."""
        try:
            self.file.write(to_line(record))
            self.file.flush()
        except OSError as error:
            self.warn(f"metrics of step {record.step} are not written: {error.strerror}")
        if self.events is not None:
            try:
                for name, value in scalars(record):
                    self.events.add_scalar(name, value, record.step)
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


def to_line(record: Record) -> str:
    """One line of JSON."""
    return json.dumps(asdict(record)) + "\n"


def read(folder: RunFolder) -> list[Record]:
    """The records of a run, but for lines that a killed process or a full disk left torn."""
    records = []
    for line in folder.metrics.read_bytes().splitlines() if folder.metrics.exists() else ():
        with contextlib.suppress(ValueError):  # not JSON
            records.append(Record(**json.loads(line)))
    return records


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """What TensorBoard shows; the load of single experts is in the JSON lines only."""
    yield "loss/train", record.loss
    yield from ((f"loss/{name}", loss) for name, loss in record.domain_loss.items())
    yield from ((f"held_out/{name}", loss) for name, loss in record.held_out.items())
    yield "optimizer/lr", record.lr
    yield "optimizer/gradient_norm", record.gradient_norm
    yield "speed/bytes_per_second", record.tokens_per_second
    for layer, load in enumerate(record.load):
        yield f"balance/layer_{layer}", record.balance[layer]
        yield f"dropped/layer_{layer}", record.dropped[layer]
        yield f"busiest_expert/layer_{layer}", max(load) * len(load)
        yield f"idlest_expert/layer_{layer}", min(load) * len(load)
