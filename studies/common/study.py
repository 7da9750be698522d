"""A comparison of kinds of the language model: what it trains, what its numbers say, its report.

A program that compares says in a `Study` what its kinds are, and is run by `run`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from studies.common import figures, pool
from studies.common.figures import Comparison, Curve
from studies.common.intervals import (
    Interval,
    digits,
    each_confidence,
    ends,
    listed,
    t_interval,
    to_dict,
)
from studies.common.outcome import Outcome, common_settings, step_seconds
from studies.common.program import (
    RESUMABLE,
    add_jobs,
    add_seeds,
    exit_status,
    jobs_at_a_time,
)
from studies.common.result import Result
from training.figures import Values
from training.program import USER_ERRORS
from training.run_folder import cores
from training.settings import Settings, SettingsError, make_parser, read_arguments

CONFIDENCE = 0.95
SEEDS = 5


@dataclass(frozen=True)
class Study:
    """What a program compares."""

    program: str
    """How it is called."""
    about: str
    """What it does and how, for --help and the results."""
    examples: str
    """Of its command line."""
    noun: str
    """What its kinds are: one word, whose plural names the option, the results and the figure."""
    yardstick: str
    """The kind that the differences are to."""
    names: tuple[str, ...]
    """All kinds that are compared where none is named."""
    name_help: str
    """How --help says what may be named."""
    read_name: Callable[[str], str]
    """Checks a name on the command line; raises argparse.ArgumentTypeError."""
    settings_of: Callable[[str, Settings], Settings]
    """The settings of a kind, from those that all have in common; raises SettingsError."""
    defaults: Settings
    """Those that all have in common."""
    settled: tuple[str, ...]
    """The settings that the comparison chooses itself."""

    @property
    def nouns(self) -> str:
        """More than one."""
        return f"{self.noun}s"


@dataclass(frozen=True)
class Kind:
    """All seeds of one kind; S seeds, N held-out tests in the course of each run."""

    final: Values
    """[S], bits per byte of held-out text at the end, of many windows."""
    steps: Values
    """[N], optimizer steps at each test."""
    losses: Values
    """[S, N], bits per byte of a few held-out windows, mean of the domains."""
    step_seconds: float

    @property
    def seconds(self) -> Values:
        """[N], time at each test."""
        return self.steps * self.step_seconds

    def at(self, seconds: Values) -> Values:
        """The losses at other times [M], on straight lines between the tests: [S, M].

        NaN before the first test and after the last.
        """
        return np.array(
            [
                np.interp(seconds, self.seconds, one, left=math.nan, right=math.nan)
                for one in self.losses
            ]
        )


def run(study: Study, arguments: list[str] | None = None) -> int:
    """Reads the command line and compares."""
    parser = make_parser(study.program, study.about, study.examples, study.defaults)
    parser.add_argument(
        f"--{study.nouns}",
        nargs="+",
        type=study.read_name,
        default=[*study.names],
        metavar="NAME",
        help=f"which, besides {study.yardstick}: {study.name_help}",
    )
    add_seeds(parser, SEEDS)
    add_jobs(parser)
    given = read_arguments(parser, arguments)
    names, seeds, jobs = given.pop(study.nouns), given.pop("seeds"), given.pop("jobs", None)
    return exit_status(
        parser,
        partial(compare, study, names, seeds, jobs, given),
        (*USER_ERRORS, pool.RunError),
        RESUMABLE,
    )


def compare(
    study: Study, wanted: Iterable[str], seeds: int, jobs: int | None, given: dict[str, Any]
) -> None:
    """Trains, times, and reports."""
    common = common_settings(study.defaults, given, study.settled)
    names = list(dict.fromkeys((study.yardstick, *wanted)))
    if len(names) == 1:
        raise SettingsError(f"--{study.nouns} must name one besides {study.yardstick}, got none")
    kinds = {name: study.settings_of(name, common) for name in names}
    text = pool.load_text(common.data)
    text.describe(common.context)

    jobs = jobs_at_a_time(jobs, common.threads)
    runs = plan(kinds, seeds)
    print(f"\n{len(runs)} runs, {jobs} at a time (held-out: bits per byte)")
    with pool.workers(jobs) as workers:
        outcomes = pool.train_all(runs, workers, show)

    print(f"\ntime of a step: the {study.nouns} take turns")
    torch.set_num_threads(cores())
    times = step_seconds(kinds, text)
    of_each = {
        name: [outcomes[run_name(name, some, seed)] for seed in range(seeds)]
        for name, some in kinds.items()
    }
    report(study, Path(common.out), common, gather(of_each, times))


def plan(kinds: Mapping[str, Settings], seeds: int) -> dict[str, Settings]:
    """All runs by name, seed by seed, so that a comparison that is stopped has as many of each."""
    runs = {}
    for seed in range(seeds):
        for kind, some in kinds.items():
            name = run_name(kind, some, seed)
            runs[name] = replace(some, seed=seed, out=str(Path(some.out) / name))
    return runs


def run_name(kind: str, some: Settings, seed: int) -> str:
    """What a run and its folder are called."""
    return f"{kind.replace(':', '-').replace('+', '-')}-seed{seed}-steps{some.steps}"


def show(name: str, outcome: Outcome) -> None:
    """One line for a run that is over."""
    print(f"  {name:40s}  held-out {outcome.held_out:.4f}  {outcome.seconds:6.0f} s", flush=True)


# ---- what the runs say


def gather(of_each: Mapping[str, Sequence[Outcome]], times: Mapping[str, float]) -> dict[str, Kind]:
    """The numbers of all runs, by kind."""
    curves = {name: [validation(one) for one in runs] for name, runs in of_each.items()}
    # A run that was stopped in between was tested there too.
    steps = sorted(set.intersection(*(set(one) for runs in curves.values() for one in runs)))
    return {
        name: Kind(
            np.array([one.held_out for one in of_each[name]]),
            np.array(steps, dtype=np.float64),
            np.array([[one[step] for step in steps] for one in runs]),
            times[name],
        )
        for name, runs in curves.items()
    }


def validation(outcome: Outcome) -> dict[int, float]:
    """The mean held-out loss of the domains, by step, where there was a test."""
    return {
        record.step: math.fsum(record.held_out.values()) / len(record.held_out)
        for record in outcome.records
        if record.held_out
    }


def equal_time(kinds: Mapping[str, Kind]) -> Values:
    """[1], the seconds after which the first kind has taken all its steps."""
    return np.array([min(kind.seconds[-1] for kind in kinds.values())])


def differences(losses: Mapping[str, Values], yardstick: str) -> dict[str, Interval]:
    """How far each kind's losses [S] are above the yardstick's, seed by seed."""
    confidence = confidence_of_each(len(losses))
    return {
        name: t_interval(some - losses[yardstick], confidence)
        for name, some in losses.items()
        if name != yardstick
    }


def confidence_of_each(kinds: int) -> float:
    """With this one for each difference, all of them hold at once with CONFIDENCE."""
    return each_confidence(CONFIDENCE, kinds - 1)


def verdict(study: Study, found: Mapping[str, Interval], seeds: int) -> list[str]:
    """What the differences say, a sentence each, and one for all that say nothing."""
    better = [name for name, one in found.items() if one.high < 0]
    worse = [name for name, one in found.items() if one.low > 0]
    unknown = [name for name, one in found.items() if np.isnan(one.low)]
    rest = [name for name in found if name not in (*better, *worse, *unknown)]
    sentences = []
    for name in better:
        mean, low, high = found[name]
        sentences.append(
            f"{name} beats {study.yardstick} by {-mean:.4f} ({-high:.4f} to {-low:.4f}) "
            "bits per byte"
        )
    for name in worse:
        mean, low, high = found[name]
        sentences.append(
            f"{name} is worse than {study.yardstick} by {mean:.4f} ({low:.4f} to {high:.4f}) "
            "bits per byte"
        )
    if rest:
        sentences.append(f"{', '.join(rest)}: no difference that {seeds} seeds can show")
    if unknown:
        why = "one seed gives no interval" if seeds == 1 else "not tested by then"
        sentences.append(f"{', '.join(unknown)}: n/a, {why}")
    if not better and len(unknown) < len(found):
        sentences.append(f"no {study.noun} beats {study.yardstick} beyond its confidence interval")
    return sentences


# ---- what is left of it


def report(study: Study, folder: Path, common: Settings, kinds: Mapping[str, Kind]) -> None:
    """Prints tables and verdicts, draws the figure, writes the numbers."""
    seeds = len(kinds[study.yardstick].final)
    end = equal_time(kinds)
    final = {name: kind.final for name, kind in kinds.items()}
    in_time = {name: kind.at(end)[:, 0] for name, kind in kinds.items()}
    by_steps = differences(final, study.yardstick)
    by_time = differences(in_time, study.yardstick)
    means = {name: t_interval(losses, CONFIDENCE) for name, losses in final.items()}

    result = Result()
    result.say(f"\nequal steps: held-out bits per byte after {common.steps} steps")
    result.show(
        table(
            study,
            ("held-out", f"{CONFIDENCE:.0%} interval"),
            {name: [digits(mean.mean), ends(mean)] for name, mean in means.items()},
            by_steps,
        )
    )
    result.say_each(verdict(study, by_steps, seeds))
    result.say(
        f"\nequal time: validation loss after {end[0]:.4g} s on {cores()} cores, the step times "
        "taken as exact"
    )
    one = kinds[study.yardstick].step_seconds
    result.show(
        table(
            study,
            ("ms/step", "ratio", "loss"),
            {
                name: [
                    f"{1000 * kind.step_seconds:.1f}",
                    f"{kind.step_seconds / one:.2f}",
                    digits(np.mean(in_time[name])),
                ]
                for name, kind in kinds.items()
            },
            by_time,
        )
    )
    result.say_each(verdict(study, by_time, seeds))
    results = {
        name: {
            "final_held_out": listed(kind.final),
            "final_interval": to_dict(means[name]),
            "final_difference": to_dict(by_steps.get(name)),
            "step_seconds": kind.step_seconds,
            "equal_time_held_out": listed(in_time[name]),
            "equal_time_difference": to_dict(by_time.get(name)),
            "steps": listed(kind.steps),
            "held_out": [listed(losses) for losses in kind.losses],
        }
        for name, kind in kinds.items()
    }
    content = {
        "about": " ".join(study.about.split()),
        "unit": "bits per byte; one number per seed in each list of losses",
        "confidence": CONFIDENCE,
        "confidence_of_each_difference": confidence_of_each(len(kinds)),
        "equal_time_seconds": end[0],
        "timed_on_cores": cores(),
        "settings": shared(study, common),
        "results": results,
    }
    result.save(draw(study, kinds), content, folder, study.nouns)


def table(
    study: Study,
    titles: Sequence[str],
    cells: Mapping[str, Sequence[str]],
    found: Mapping[str, Interval],
) -> Table:
    """A row per kind: its cells, and its difference to the yardstick."""
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)  # fits into 80 columns
    rows.add_column(study.noun, no_wrap=True)
    confidence = f"{100 * confidence_of_each(len(cells)):.3g}%"
    for title in (*titles, f"to {study.yardstick}", f"{confidence} interval"):
        rows.add_column(title, justify="right", no_wrap=True)
    for name, row in cells.items():
        one = found.get(name)
        rows.add_row(
            name, *row, *(("", "") if one is None else (digits(one.mean, "+"), ends(one, "+")))
        )
    return rows


def draw(study: Study, kinds: Mapping[str, Kind]) -> Figure:
    """The curves by steps and by time."""
    yardstick = kinds[study.yardstick]
    by_steps, by_time = Comparison({}, {}), Comparison({}, {})
    for name, kind in kinds.items():
        mean = t_interval(kind.losses, CONFIDENCE)
        by_steps.loss[name] = Curve(kind.steps, mean)
        by_time.loss[name] = Curve(kind.seconds, mean)
        if kind is yardstick:
            continue
        by_steps.difference[name] = Curve(
            kind.steps, t_interval(kind.losses - yardstick.losses, CONFIDENCE)
        )
        times = shared_times(kind.seconds, yardstick.seconds)
        if len(times):
            by_time.difference[name] = Curve(
                times, t_interval(kind.at(times) - yardstick.at(times), CONFIDENCE)
            )
    seeds = len(yardstick.final)
    about = f"line: mean of {seeds} seeds    band: {CONFIDENCE:.0%} interval at each point"
    return figures.study(by_steps, by_time, study.yardstick, about if seeds > 1 else "one seed")


def shared_times(some: Values, yardstick: Values) -> Values:
    """Times at which both curves are known: the yardstick's tests, and the end of the shorter.

    Straight lines between the tests of a curve that falls are above it. Were both curves' tests
    taken, the difference would jump from one to the other.
    """
    start, end = max(some[0], yardstick[0]), min(some[-1], yardstick[-1])
    inside = yardstick[(yardstick >= start) & (yardstick < end)]
    return np.append(inside, end) if start <= end else inside


def shared(study: Study, common: Settings) -> dict[str, Any]:
    """The settings of all runs, without what only this machine knows where it is."""
    left_out = {*study.settled, "out"} - {"feed_forward"}
    settings = {name: v for name, v in common.to_dict().items() if name not in left_out}
    return {**settings, "data": [Path(path).name for path in common.data]}
