"""Trains a mixture-of-experts language model on real text and tells how well it learned.

The model reads bytes and predicts the next one. While it trains, the display shows the loss in bits
per byte, the speed, how evenly the experts are used and how much of the work was dropped. At the
end it is measured on text that it has not seen, beside n-gram models of the same text, writes some
text of its own, and draws what its experts specialized in.
"""

# Read in this order: run() and train() below, lm/model.py, lm/corpus.py with lm/cleaning.py. Then
# what surrounds a run: lm/settings.py, lm/checkpoint.py with lm/run_folder.py, lm/parallel.py. Then
# what it shows: lm/metrics.py, lm/display.py, lm/evaluation.py, lm/report.py and what they import.

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which `python -P` leaves out

import terminal
import torchmoe
from lm import checkpoint, corpus, parallel, run_folder
from lm.checkpoint import Checkpoint, CheckpointError, Progress
from lm.display import make_display
from lm.evaluation import bits_by_domain, held_out_windows
from lm.metrics import Meter, Metrics, Step
from lm.model import ByteLM, LMOutput, loss_per_row
from lm.parallel import Processes
from lm.report import report
from lm.run_folder import FolderError, RunFolder
from lm.settings import (
    TORCH_DTYPES,
    Settings,
    SettingsError,
    make_parser,
    new_run,
    read_arguments,
    resumed_run,
    run_from,
    with_config,
)

EXAMPLES = """\
examples:
  train_lm.py                               three domains of text that every machine has
  train_lm.py --resume                      go on with a run that was stopped or killed
  train_lm.py --minutes 20 --layers 6       longer and deeper; the schedule follows the clock
  train_lm.py --data ~/notes src/           your own text, one domain per path
  train_lm.py --top-k 1 --estimator straight_through --capacity-factor 1.25
  train_lm.py --balance bias --capacity-factor 1 --overflow next_best
  train_lm.py --config runs/lm/run.json --seed 1 --out runs/seed1
                                            the settings of another run, one of them changed
  train_lm.py --load runs/lm                evaluate and sample only
  train_lm.py --load runs/lm --steps 500 --out runs/longer   start a run from trained weights
  torchrun --nproc-per-node 2 train_lm.py   data-parallel, the same batch shared by two processes
"""
WARM_UP_STEPS = 100
FINAL_LR_SHARE = 0.1  # the cosine ends there
WEIGHT_DECAY = 0.1
MAX_GRADIENT_NORM = 1.0
STEPS_PER_RECORD = 10
RECORDS_AT_LEAST = 25  # of a short run
QUICK_WINDOWS = 32  # per domain, in the held-out test at each checkpoint
USER_ERRORS = (SettingsError, corpus.CorpusError, CheckpointError, FolderError)


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line, runs, and turns what the user can mend into one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal cannot show
    parser = make_parser("train_lm.py", __doc__ or "", EXAMPLES, Settings())
    given = read_arguments(parser, arguments)
    try:
        return run(given)
    except USER_ERRORS as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted; what the last checkpoint holds is saved", file=sys.stderr)
        return 130


def run(given: dict[str, Any]) -> int:
    """The whole program: settings, text, model, training, and what it learned."""
    settings, start, resumes = choose_settings(given)
    check_device(settings)
    set_threads(settings)
    with parallel.processes(settings.device) as group, contextlib.ExitStack() as stack:
        if not group.leads:
            silence = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        status = run_with(settings, start, resumes, group)
        group.wait()  # none leaves while another still needs the group
        return status


def run_with(settings: Settings, start: Checkpoint | None, resumes: bool, group: Processes) -> int:
    """The program in one of the processes that train together."""
    folder = RunFolder(Path(settings.out))
    trains = settings.steps != 0
    with contextlib.ExitStack() as stack:
        if trains and group.leads:
            stack.enter_context(run_folder.locked(folder.path))
            folder.make()
        return run_in(folder, settings, start, resumes, group)


def run_in(
    folder: RunFolder,
    settings: Settings,
    start: Checkpoint | None,
    resumes: bool,
    group: Processes,
) -> int:
    """The same with the folder in hand."""
    trains = settings.steps != 0

    # 1. Text, and a model with its optimizer, new or from a checkpoint.
    text = corpus.Text.load(list(settings.data))
    text.describe(settings.context)
    job = new_job(settings, start, resumes, group)
    describe(job, start)

    # 2. Training.
    if trains and group.leads:
        open_folder(folder, job, text, start if resumes else None)
    group.wait()
    watcher = None
    if trains and job.share < 1:
        watcher = job.watcher
        try:
            interrupted = train(job, text, folder, group)
        except OSError:  # what is printed has no place any more
            if group.leads:
                job.save(folder)
            raise
        if interrupted:
            out = "" if settings.out == Settings().out else f" --out {settings.out}"
            print(f"interrupted after {job.progress.step} steps; to go on, run with: --resume{out}")
            return 130
    elif resumes:
        print(f"this run is over, after {job.progress.step} steps")
        if folder.results.exists():
            return 0

    # 3. What it learned.
    if group.leads:
        report(job.model, text, settings, job.progress, folder if trains else None, watcher)
    return 0


# ---- before


def choose_settings(given: dict[str, Any]) -> tuple[Settings, Checkpoint | None, bool]:
    """The run's settings, the checkpoint that it starts from, and whether it resumes that one."""
    given = with_config(given)
    resumes = given.pop("resume", False)
    if resumes:
        out = Path(given.get("out", Settings().out))
        if checkpoint.in_order(RunFolder(out).checkpoints):
            start = checkpoint.load(RunFolder(out).checkpoints, "--resume")
            given["out"] = str(out)  # the folder may have been moved
            return resumed_run(start.settings, given), start, True
        print(f"{out} holds no checkpoint to resume from: starting from the beginning")
    if given.get("load") is not None:
        start = checkpoint.load(Path(given["load"]))
        return run_from(start.settings, given), start, False
    return new_run(Settings(), given), None, False


def check_device(settings: Settings) -> None:
    """Raises SettingsError where the device is not there."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device: cuda must be there, but torch finds no GPU")
    if settings.device == "cuda" and torchmoe.build_info()["cuda"] == "none":
        raise SettingsError("--device: cuda needs a torchmoe with CUDA kernels, got a CPU build")


def set_threads(settings: Settings) -> None:
    """Threads as asked for; torchrun has set one per process where that was not asked."""
    if settings.threads:
        torch.set_num_threads(settings.threads)


@dataclass
class Job:
    """What moves while a run trains."""

    settings: Settings
    model: ByteLM
    optimizer: torch.optim.Optimizer
    progress: Progress
    watcher: torchmoe.Watcher | None
    """Follows the experts while the run trains; None of a dense model."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What computes and what it reads, once the run has its folder; part of its checkpoints."""

    def save(self, folder: RunFolder) -> None:
        """Writes the checkpoint of this step."""
        checkpoint.save(
            folder.checkpoints,
            self.model,
            self.optimizer,
            self.settings,
            self.progress,
            self.origin,
        )

    @property
    def share(self) -> float:
        """Share of the run that is over, by steps or by the clock, whichever is further."""
        steps, minutes = self.settings.steps, self.settings.minutes
        done = self.progress.step - self.progress.first_step
        by_steps = done / steps if steps else 0.0
        by_clock = self.progress.seconds / (60 * minutes) if minutes else 0.0
        return max(by_steps, by_clock)

    def lr(self, share: float) -> float:
        """Learning rate of the next step: a linear warm-up, then half a cosine."""
        steps = self.settings.steps
        done = self.progress.step - self.progress.first_step
        warm_up_steps = min(WARM_UP_STEPS, steps // 10) if steps else WARM_UP_STEPS
        warm_up = min(1.0, (done + 1) / (warm_up_steps + 1))
        cosine = (1 + math.cos(math.pi * min(share, 1.0))) / 2
        return self.settings.lr * warm_up * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


def new_job(settings: Settings, start: Checkpoint | None, resumes: bool, group: Processes) -> Job:
    """A model and its optimizer, as a checkpoint has them where there is one."""
    if settings.rows % group.count:
        raise SettingsError(
            f"--batch-tokens must give every process as many windows, got {settings.rows} windows "
            f"for {group.count} processes"
        )
    torch.manual_seed(settings.seed)
    model = ByteLM(settings.model())
    progress = Progress()
    if start is not None:
        model.to(TORCH_DTYPES[start.settings.dtype])
        checkpoint.restore_model(start, model)
        progress = Progress(first_step=start.progress.step, step=start.progress.step)
    model.to(group.device(settings.device), TORCH_DTYPES[settings.dtype])
    optimizer = make_optimizer(model, settings.lr)
    if start is not None and resumes:
        checkpoint.restore_optimizer(start, optimizer)
        progress = start.progress
    watcher = torchmoe.watch(model) if model.moes else None
    if watcher is not None:
        watcher.close()  # until training begins
    return Job(settings, model, optimizer, progress, watcher)


def make_optimizer(model: ByteLM, lr: float) -> torch.optim.Optimizer:
    """AdamW that lets matrices decay and leaves the norms' scales alone."""
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() >= 2]
    scales = [(name, p) for name, p in model.named_parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": scales, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def describe(job: Job, start: Checkpoint | None) -> None:
    """Prints what is going to be trained."""
    settings = job.settings
    if start is not None:
        print(f"from: {start.path}, {start.progress.step} steps")
    total, active = job.model.count_parameters()
    kind = "dense"
    if settings.feed_forward == "moe":
        kind = f"top {settings.top_k} of {settings.experts} experts"
    print(
        f"model: {settings.layers} layers, {kind}, {total:,} parameters, "
        f"{active:,} at work on a byte, {torch.get_num_threads()} threads"
    )


def open_folder(folder: RunFolder, job: Job, text: corpus.Text, resumed: Checkpoint | None) -> None:
    """Makes the folder this run's; from here on there is a checkpoint to resume from.

    Raises:
        CorpusError: the text is no longer the one that the resumed run reads.
    """
    job.origin = {**run_folder.origin(), "text_sha256": text.sha256()}
    if resumed is not None and resumed.origin.get("text_sha256") != job.origin["text_sha256"]:
        raise corpus.CorpusError(
            f"--resume: the text is not the one that {resumed.path} was trained on; "
            "--load starts a new run from its weights"
        )
    folder.check_room(checkpoint.size_of(job.model), resumes=resumed is not None)
    if resumed is not None:
        return
    aside = folder.set_aside()
    if aside is not None:
        print(f"the files of an earlier run are in {aside} now")
    run_folder.write_json(folder.run, {"settings": job.settings.to_dict(), **job.origin})
    job.save(folder)


# ---- training


def train(job: Job, text: corpus.Text, folder: RunFolder, group: Processes) -> bool:
    """Trains until the steps or the minutes are over, or until somebody asks it to stop.

    Leaves a checkpoint of the last step. Gives whether it was asked to stop.
    """
    settings, model, progress, watcher = job.settings, job.model, job.progress, job.watcher
    quick = held_out_windows(text.held_out, settings.context, QUICK_WINDOWS)
    record_every = STEPS_PER_RECORD
    if settings.steps:
        record_every = max(1, min(STEPS_PER_RECORD, settings.steps // RECORDS_AT_LEAST))

    # Compiled for the one shape of training; held-out tests and samples use the model as it is.
    learner = group.wrap(cast(nn.Module, torch.compile(model)) if settings.compile else model)
    learner.train()
    with contextlib.ExitStack() as stack:
        stopped = stack.enter_context(asked_to_stop())
        if watcher is not None:  # it must be there before the first step is compiled
            stack.enter_context(watcher)
        display = stack.enter_context(
            contextlib.closing(
                make_display(f"{settings.out}: {', '.join(settings.data) or 'default text'}")
            )
        )
        metrics = None
        if group.leads:
            metrics = Metrics(folder, progress.step, display.message, watcher)
            stack.enter_context(contextlib.closing(metrics))
        meter = Meter(list(text.train), progress, group, watcher)
        clock = Stopwatch()
        share, ends = *group.agree(job.share), False
        while not ends:
            # 1. One optimizer step.
            lr = job.lr(share)
            step = optimizer_step(job, learner, text, lr, group)
            progress.training_seconds += clock.lap()

            # 2. What it shows and writes.
            meter.add(step)
            share, stops = group.agree(job.share, float(bool(stopped)))
            ends = share >= 1 or stops > 0
            saves = ends or progress.step % settings.checkpoint_every == 0
            if saves or progress.step % record_every == 0:
                record = meter.record(lr)
                if not math.isfinite(record.loss):
                    raise SettingsError(
                        f"the loss is {record.loss} at step {progress.step}: --lr must be lower"
                    )
                progress.reporting_seconds += clock.lap()
                if saves and group.leads:
                    record = replace(record, held_out=bits_by_domain(model, quick, settings.rows))
                    progress.saving_seconds += clock.lap()
                if metrics is not None:
                    metrics.write(record)
                display.show(record, share)
            progress.reporting_seconds += clock.lap()

            # 3. What it keeps.
            if saves and group.leads:
                try:
                    job.save(folder)
                except CheckpointError as error:
                    if ends:
                        raise
                    display.message(f"warning: {error}; the run goes on without this checkpoint")
                progress.saving_seconds += clock.lap()
    return share < 1


def optimizer_step(
    job: Job, learner: nn.Module, text: corpus.Text, lr: float, group: Processes
) -> Step:
    """Reads a batch and moves the weights; `learner` is the job's model, compiled or parallel."""
    settings, model, progress = job.settings, job.model, job.progress
    device = group.device(settings.device)
    for parameters in job.optimizer.param_groups:
        parameters["lr"] = lr
    inputs, targets, domains = next_batch(text, progress.step, settings, group)
    torch.manual_seed(step_seed("noise", settings.seed, progress.step, group.rank))
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
        output: LMOutput = learner(inputs.to(device))
    losses = loss_per_row(output.logits, targets.to(device))  # [B]
    loss = losses.mean() + output.aux_loss
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    job.optimizer.step()
    job.optimizer.zero_grad()
    model.update(output.routings)
    progress.step += 1
    progress.bytes += settings.rows * settings.context
    return Step(losses.detach(), domains.to(device), output, norm)


class Stopwatch:
    """Tells the time between looks at it."""

    def __init__(self) -> None:
        """Starts now."""
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last look."""
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def next_batch(
    text: corpus.Text, step: int, settings: Settings, group: Processes
) -> tuple[Tensor, Tensor, Tensor]:
    """This process's windows of a step's batch, at random places, the domains in turn.

    Returns:
        Inputs and targets [B, context] and the number of each window's domain [B], all int64.
    """
    generator = torch.Generator().manual_seed(step_seed("data", settings.seed, step))
    texts = list(text.train.values())
    domains = (step * settings.rows + torch.arange(settings.rows)) % len(texts)  # [rows]
    windows = []
    for domain in domains.tolist():
        data = texts[domain]
        start = int(torch.randint(len(data) - settings.context, (), generator=generator))
        windows.append(data[start : start + settings.context + 1])
    mine = group.share(settings.rows)
    batch = torch.stack(windows[mine]).long()  # [B, context + 1]
    return batch[:, :-1], batch[:, 1:], domains[mine]


def step_seed(purpose: str, *numbers: int) -> int:
    """A seed for one step. Since nothing is drawn from before, there is no random state to save."""
    text = " ".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C, SIGTERM or SIGHUP: the step at hand is finished first.

    The second time, Ctrl-C does what it did before: it stops at once. Presses that follow each
    other at once are one. What is ignored stays ignored, as SIGHUP, which comes when a terminal is
    closed, under nohup, and Ctrl-C in a script's background job. In another thread than the main
    one, which gets no signals, it stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def remember(number: int, frame: FrameType | None) -> None:
        former = before[signal.Signals(number)]
        if received and number == signal.SIGINT and callable(former):
            former(number, frame)
        received.append(number)

    before = {}
    for number, handler in (
        (signal.SIGINT, terminal.OnePress(remember)),
        (signal.SIGTERM, remember),
        (signal.SIGHUP, remember),
    ):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield received
    finally:
        for number, former in before.items():
            signal.signal(number, former)


if __name__ == "__main__":
    terminal.run(main)
