"""What do display and metrics cost a training step?

Run it as `python -m benchmarks.training_overhead`. The default model of examples/train_lm.py trains
in rounds of a few records, so that the live display draws as rarely as in a run of its own. The
contenders take turns round by round: steps alone; steps with metrics and plain lines; steps with
metrics and the live display. Two numbers answer: the time inside reporting over the time of the
steps, which is exact but blind to what TensorBoard's thread takes away from the steps; and the
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

import train_lm
from lm.corpus import Text
from lm.display import Display, LiveDisplay, PlainDisplay
from lm.metrics import Meter, Metrics
from lm.parallel import ALONE
from lm.run_folder import RunFolder
from lm.settings import Settings

RECORDS_PER_ROUND = 6


@dataclass
class Contender:
    """One way to report, with a model of its own."""

    name: str
    job: train_lm.Job
    display: Display | None
    metrics: Metrics | None
    meter: Meter
    rounds: list[float] = field(default_factory=list)
    reporting: float = 0.0

    def round(self, text: Text, share: float) -> None:
        """Trains for some records."""
        begin = time.perf_counter()
        for _ in range(RECORDS_PER_ROUND):
            self.train_for_a_record(text, share)
        self.rounds.append(time.perf_counter() - begin)

    def train_for_a_record(self, text: Text, share: float) -> None:
        """Some steps, and what is shown and written of them."""
        for _ in range(train_lm.STEPS_PER_RECORD):
            step_begin = time.perf_counter()
            step = train_lm.optimizer_step(self.job, self.job.model, text, 3e-3, ALONE)
            self.job.progress.training_seconds += time.perf_counter() - step_begin
            if self.metrics is not None:
                report_begin = time.perf_counter()
                self.meter.add(step)
                self.reporting += time.perf_counter() - report_begin
        if self.metrics is not None and self.display is not None:
            report_begin = time.perf_counter()
            record = self.meter.record(3e-3)
            self.metrics.write(record)
            self.display.show(record, share)
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
        displays = {"steps alone": None, "plain lines": plain, "live display": live}
        contenders = []
        for name, display in displays.items():
            job = train_lm.new_job(settings, None, False, ALONE)
            job.model.train()
            metrics = None
            if display is not None:
                place = RunFolder(folder / name)
                place.make()
                metrics = Metrics(place, 0, print)
                stack.enter_context(contextlib.closing(metrics))
            meter = Meter(list(text.train), job.progress, ALONE)
            contenders.append(Contender(name, job, display, metrics, meter))
        for number in range(rounds):
            first = number % len(contenders)
            for contender in contenders[first:] + contenders[:first]:
                with contextlib.redirect_stdout(io.StringIO()):
                    contender.round(text, number / rounds)

    print(f"{'':14s}  ms a step (fastest round)  against steps alone  inside reporting")
    steps = RECORDS_PER_ROUND * train_lm.STEPS_PER_RECORD
    for one in contenders:
        fastest = min(one.rounds)
        ratio = fastest / min(contenders[0].rounds) - 1
        inside = one.reporting / one.job.progress.training_seconds
        print(f"{one.name:14s}  {1e3 * fastest / steps:25.1f}  {ratio:+19.2%}  {inside:16.2%}")


if __name__ == "__main__":
    main()
