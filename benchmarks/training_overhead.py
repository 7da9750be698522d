"""What do watch, metrics and display cost a training step?

Run it as `python -m benchmarks.training_overhead`. The default model of examples/train_lm.py trains
in rounds of a few records, so that the live display draws as rarely as in a run of its own. The
contenders take turns round by round: steps alone; steps that torchmoe.watch follows, whose numbers
are collected for each record; the same with metrics and plain lines; the same with metrics and the
live display. Two numbers answer: the time inside of watch and reporting over the time of the steps
without it, which is exact but blind to what TensorBoard's thread takes away from the steps; and the
ratio of the fastest rounds, which sees all of it and the machine's noise too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torchmoe
import train_lm
from training.batches import next_batch
from training.corpus import Text
from training.display import Display, LiveDisplay, PlainDisplay
from training.job import Job
from training.metrics import Meter, Metrics
from training.parallel import ALONE
from training.recorder import STEPS_PER_RECORD
from training.run_folder import RunFolder
from training.settings import Settings

RECORDS_PER_ROUND = 6


@dataclass
class Contender:
    """One way to watch and report, with a model of its own."""

    name: str
    job: Job
    watcher: torchmoe.Watcher | None = None
    meter: Meter | None = None
    metrics: Metrics | None = None
    display: Display | None = None
    rounds: list[float] = field(default_factory=list)
    in_hooks: float = 0.0
    reporting: float = 0.0
    hook_began: float = 0.0

    def time_hooks(self) -> None:
        """Times what runs between two of this program's own hooks: the watcher's hooks."""
        for moe in self.job.model.moes:
            moe.register_forward_hook(self.begin_hooks, prepend=True)
            moe.register_forward_hook(self.end_hooks)

    def begin_hooks(self, *_: object) -> None:
        """A layer's hooks begin."""
        self.hook_began = time.perf_counter()

    def end_hooks(self, *_: object) -> None:
        """They are over."""
        self.in_hooks += time.perf_counter() - self.hook_began

    @property
    def inside(self) -> float:
        """Time of watch and reporting over that of the steps without."""
        steps = self.job.progress.training_seconds - self.in_hooks
        return (self.in_hooks + self.reporting) / steps

    def round(self, text: Text, share: float) -> None:
        """Trains for some records."""
        begin = time.perf_counter()
        for _ in range(RECORDS_PER_ROUND):
            self.train_for_a_record(text, share)
        self.rounds.append(time.perf_counter() - begin)

    def train_for_a_record(self, text: Text, share: float) -> None:
        """Some steps, and what is shown and written of them."""
        for _ in range(STEPS_PER_RECORD):
            step_begin = time.perf_counter()
            batch = next_batch(text, self.job.progress.step, self.job.settings, ALONE)
            step = train_lm.optimizer_step(self.job, self.job.model, batch, 3e-3, ALONE)
            report_begin = time.perf_counter()
            self.job.progress.training_seconds += report_begin - step_begin
            if self.meter is not None:
                self.meter.add(step)
                self.reporting += time.perf_counter() - report_begin
        report_begin = time.perf_counter()
        if self.meter is not None and self.metrics is not None and self.display is not None:
            record = self.meter.record(3e-3)
            self.metrics.write(record)
            self.display.show(record, share)
        elif self.watcher is not None:
            # What a loop would read, which waits for the numbers.
            for layer in self.watcher.collect().values():
                layer.max_violation.item()
        self.reporting += time.perf_counter() - report_begin


def main() -> None:
    """Times and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6, help="per contender (default 6)")
    rounds: int = parser.parse_args().rounds
    settings = Settings()
    text = Text.load([])
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        screen = stack.enter_context(Path(os.devnull).open("w"))
        with contextlib.redirect_stdout(io.StringIO()):
            plain = PlainDisplay()
        live = LiveDisplay("overhead", Console(file=screen, force_terminal=True, width=100))
        stack.enter_context(contextlib.closing(live))
        displays = {
            "steps alone": None,
            "watch alone": None,
            "plain lines": plain,
            "live display": live,
        }
        contenders = []
        for name, display in displays.items():
            job = train_lm.new_job(settings)
            job.model.train()
            one = Contender(name, job, display=display)
            contenders.append(one)
            if name == "steps alone" or job.watcher is None:
                continue
            one.watcher = stack.enter_context(job.watcher)
            one.time_hooks()
            if display is not None:
                place = RunFolder(folder / name)
                place.make()
                one.metrics = Metrics(place, 0, print, one.watcher)
                stack.enter_context(contextlib.closing(one.metrics))
                one.meter = Meter(list(text.train), job.progress, ALONE, one.watcher)
        for number in range(rounds):
            first = number % len(contenders)
            for contender in contenders[first:] + contenders[:first]:
                with contextlib.redirect_stdout(io.StringIO()):
                    contender.round(text, number / rounds)

    print(f"{'':14s}  ms a step (fastest round)  against steps alone  inside watch and reporting")
    steps = RECORDS_PER_ROUND * STEPS_PER_RECORD
    for one in contenders:
        fastest = min(one.rounds)
        ratio = fastest / min(contenders[0].rounds) - 1
        print(f"{one.name:14s}  {1e3 * fastest / steps:25.1f}  {ratio:+19.2%}  {one.inside:26.2%}")


if __name__ == "__main__":
    main()
