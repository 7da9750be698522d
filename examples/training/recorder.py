"""What goes with each optimizer step: display, metrics, held-out tests, checkpoints, Ctrl-C."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import replace
from types import TracebackType

from training.checkpoint import CheckpointError
from training.corpus import Text
from training.display import make_display
from training.evaluation import bits_by_domain, held_out_windows
from training.job import Job
from training.metrics import Meter, Metrics, Step
from training.parallel import Processes
from training.run_folder import RunFolder
from training.settings import SettingsError
from training.terminal import asked_to_stop

STEPS_PER_RECORD = 10
RECORDS_AT_LEAST = 25  # of a short run
QUICK_WINDOWS = 32  # per domain, in the held-out test at each checkpoint


class Recorder:
    """Follows a run step by step, and says when it is over.

        with Recorder(job, text, folder, group) as recorder:
            while not recorder.is_over:
                recorder.add(...)

    A run is over after its steps or minutes, or when somebody asks it to stop: by Ctrl-C, SIGTERM
    or SIGHUP. Its last step leaves a checkpoint.
    """

    def __init__(self, job: Job, text: Text, folder: RunFolder, group: Processes) -> None:
        """Takes what moves, what it reads, where it writes and who trains."""
        self.job = job
        self.folder = folder
        self.group = group
        self.domains = list(text.train)
        self.quick = held_out_windows(text.held_out, job.settings.context, QUICK_WINDOWS)
        self.record_every = STEPS_PER_RECORD
        if job.settings.steps:
            few = job.settings.steps // RECORDS_AT_LEAST
            self.record_every = max(1, min(STEPS_PER_RECORD, few))
        self.is_over = False
        (self.share,) = group.agree(job.share)
        """Of the run that is over, the same in all processes."""

    def __enter__(self) -> Recorder:
        """Takes the terminal, opens the files and starts the clock."""
        settings, watcher = self.job.settings, self.job.watcher
        with contextlib.ExitStack() as stack:
            self.stopped = stack.enter_context(asked_to_stop())
            if watcher is not None:  # it must be there before the first step is compiled
                stack.enter_context(watcher)
            title = f"{settings.out}: {', '.join(settings.data) or 'default text'}"
            self.display = stack.enter_context(contextlib.closing(make_display(title)))
            self.metrics = None
            if self.group.leads:
                self.metrics = Metrics(
                    self.folder, self.job.progress.step, self.display.message, watcher
                )
                stack.enter_context(contextlib.closing(self.metrics))
            self.meter = Meter(self.domains, self.job.progress, self.group, watcher)
            self.clock = Stopwatch()
            self.opened = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the files and gives the terminal back."""
        self.opened.__exit__(kind, error, traceback)

    def add(self, step: Step, lr: float) -> None:
        """Counts a step; now and then shows it, writes it and saves a checkpoint.

        Args:
            step: what it gave.
            lr: the learning rate that it was taken with.
        """
        job, progress = self.job, self.job.progress
        progress.training_seconds += self.clock.lap()
        self.meter.add(step)
        self.share, stops = self.group.agree(job.share, float(bool(self.stopped)))
        self.is_over = self.share >= 1 or stops > 0
        saves = self.is_over or progress.step % job.settings.checkpoint_every == 0
        if saves or progress.step % self.record_every == 0:
            self._record(lr, saves and self.group.leads)
        progress.reporting_seconds += self.clock.lap()
        if saves and self.group.leads:
            self._save()
            progress.saving_seconds += self.clock.lap()

    def _record(self, lr: float, tests: bool) -> None:
        """Shows and writes the steps since the last record, with a held-out test if it `tests`."""
        job, progress = self.job, self.job.progress
        record = self.meter.record(lr)
        if not math.isfinite(record.loss):
            raise SettingsError(
                f"the loss is {record.loss} at step {progress.step}: --lr must be lower"
            )
        progress.reporting_seconds += self.clock.lap()
        if tests:
            held_out = bits_by_domain(job.model, self.quick, job.settings.rows)
            record = replace(record, held_out=held_out)
            progress.saving_seconds += self.clock.lap()
        if self.metrics is not None:
            self.metrics.write(record)
        self.display.show(record, self.share)

    def _save(self) -> None:
        """Writes a checkpoint; only the last one must succeed."""
        try:
            self.job.save(self.folder)
        except CheckpointError as error:
            if self.is_over:
                raise
            self.display.message(f"warning: {error}; the run goes on without this checkpoint")


class Stopwatch:
    """Tells the time between looks at it."""

    def __init__(self) -> None:
        """Starts now."""
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last look."""
        before, self.last = self.last, time.perf_counter()
        return self.last - before
