"""Compares the router's gradient estimators: does any train the model better than the exact one?

The transformer of train_lm.py is trained with each, several seeds of each, all with the same
settings. At equal seed all start from the same weights and read the same bytes in the same order,
so that differences to exact are taken seed by seed. Their confidence intervals are Student's,
corrected for how many estimators are compared. An estimator comes with the normalisation of the
weights that it is made for; "exact:none" is exact with that of default_vector and sparsemixer,
which tells what is theirs and what the normalisation's.

Runs are trained some at a time, which makes their own times useless. A step's time is measured
afterwards, with all cores and the estimators taking turns; curves by time are steps times that.
Equal time is when the estimator with the fastest steps ends. Slower ones are then before the end of
their schedule, their learning rate still high: that is part of what their steps cost. The intervals
at equal time hold for the step times as measured, whose own error is not in them.

Stopped and started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

import train_lm
from lm import corpus, figures, pool, run_folder
from lm.comparison import Outcome, common_settings, step_seconds
from lm.figures import Comparison, Curve
from lm.intervals import Interval, Values, each_confidence, t_interval
from lm.settings import Settings, SettingsError, make_parser, number, read_arguments
from torchmoe.nn import known_estimators
from torchmoe.nn.estimators.estimator import NORMALIZES

DEFAULTS = replace(Settings(), steps=1000, checkpoint_every=100, threads=1, out="runs/estimators")
# What the comparison chooses itself.
SETTLED = ("feed_forward", "estimator", "seed", "minutes", "load", "resume")
EXAMPLES = """\
examples:
  compare_estimators.py                         every estimator, over an hour on two cores
  compare_estimators.py --estimators straight_through exact:none --seeds 10
  compare_estimators.py --top-k 1 --out runs/estimators-top1
"""
YARDSTICK = "exact"
CONTROL = "exact:none"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Kind:
    """All seeds of one estimator; S seeds, N held-out tests in the course of each run."""

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


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line and compares."""
    parser = make_parser("compare_estimators.py", __doc__ or "", EXAMPLES, DEFAULTS)
    parser.add_argument(
        "--estimators",
        nargs="+",
        type=kind_name,
        default=[*known_estimators(), CONTROL],
        metavar="NAME",
        help=f"which, beside {YARDSTICK}: {', '.join(known_estimators())}; NAME:NORMALIZE is one "
        f"with other weights (default all, and {CONTROL})",
    )
    parser.add_argument(
        "--seeds", type=number(int, 1, 100), default=5, metavar="N", help="of each (default 5)"
    )
    parser.add_argument(
        "--jobs",
        type=number(int, 1, 4096),
        metavar="N",
        help="runs at a time, each on --threads of its own (default as many as the cores can)",
    )
    given = read_arguments(parser, arguments)
    try:
        compare(given.pop("estimators"), given.pop("seeds"), given.pop("jobs", None), given)
    except (*train_lm.USER_ERRORS, pool.RunError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def kind_name(text: str) -> str:
    """An estimator on the command line, as NAME or NAME:NORMALIZE."""
    name, colon, normalize = text.partition(":")
    if name not in known_estimators():
        known = ", ".join(known_estimators())
        raise argparse.ArgumentTypeError(f"must name one of {known}, got {text!r}")
    if colon and normalize not in NORMALIZES:
        known = ", ".join(NORMALIZES)
        raise argparse.ArgumentTypeError(f"must have one of {known} after the colon, got {text!r}")
    return text


def settings_of(kind: str, common: Settings) -> Settings:
    """The settings of a model with that estimator.

    Raises:
        SettingsError: it is not defined for its normalisation.
    """
    name, _, normalize = kind.partition(":")
    settings = replace(common, estimator=name, normalize=normalize or common.normalize)
    settings.check()
    return settings


def compare(estimators: Iterable[str], seeds: int, jobs: int | None, given: dict[str, Any]) -> None:
    """Trains, times, and reports."""
    common = common_settings(DEFAULTS, given, SETTLED)
    names = list(dict.fromkeys((YARDSTICK, *estimators)))
    if len(names) == 1:
        raise SettingsError(f"--estimators must name one beside {YARDSTICK}, got none")
    text = corpus.Text.load(list(common.data))
    text.describe(common.context)

    jobs = jobs or max(1, cores() // (common.threads or cores()))
    kinds = {name: settings_of(name, common) for name in names}
    runs = plan(kinds, seeds)
    print(f"\n{len(runs)} runs, {jobs} at a time (held-out: bits per byte)")
    outcomes = pool.train_all(runs, jobs, show)

    print("\ntime of a step: the estimators take turns")
    torch.set_num_threads(cores())
    times = step_seconds(kinds, text)
    of_each = {
        name: [outcomes[run_name(name, some, seed)] for seed in range(seeds)]
        for name, some in kinds.items()
    }
    report(Path(common.out), common, gather(of_each, times))


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


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
    return f"{kind.replace(':', '-')}-seed{seed}-steps{some.steps}"


def show(name: str, outcome: Outcome) -> None:
    """One line for a run that is over."""
    print(f"  {name:40s}  held-out {outcome.held_out:.4f}  {outcome.seconds:6.0f} s", flush=True)


# ---- what the runs say


def gather(of_each: Mapping[str, Sequence[Outcome]], times: Mapping[str, float]) -> dict[str, Kind]:
    """The numbers of all runs, by estimator."""
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
    """[1], the seconds after which the first estimator has taken all its steps."""
    return np.array([min(kind.seconds[-1] for kind in kinds.values())])


def differences(losses: Mapping[str, Values]) -> dict[str, Interval]:
    """How far each estimator's losses [S] are above the yardstick's, seed by seed."""
    confidence = confidence_of_each(len(losses))
    return {
        name: t_interval(some - losses[YARDSTICK], confidence)
        for name, some in losses.items()
        if name != YARDSTICK
    }


def confidence_of_each(kinds: int) -> float:
    """With this one for each difference, all of them hold at once with CONFIDENCE."""
    return each_confidence(CONFIDENCE, kinds - 1)


def verdict(found: Mapping[str, Interval], seeds: int) -> list[str]:
    """What the differences say, a sentence each, and one for all that say nothing."""
    better = [name for name, one in found.items() if one.high < 0]
    worse = [name for name, one in found.items() if one.low > 0]
    unknown = [name for name, one in found.items() if np.isnan(one.low)]
    rest = [name for name in found if name not in (*better, *worse, *unknown)]
    sentences = []
    for name in better:
        mean, low, high = found[name]
        sentences.append(
            f"{name} beats {YARDSTICK} by {-mean:.4f} ({-high:.4f} to {-low:.4f}) bits per byte"
        )
    for name in worse:
        mean, low, high = found[name]
        sentences.append(
            f"{name} is worse than {YARDSTICK} by {mean:.4f} ({low:.4f} to {high:.4f}) "
            "bits per byte"
        )
    if rest:
        sentences.append(f"{', '.join(rest)}: no difference that {seeds} seeds can show")
    if unknown:
        why = "one seed gives no interval" if seeds == 1 else "not tested by then"
        sentences.append(f"{', '.join(unknown)}: n/a, {why}")
    if not better and len(unknown) < len(found):
        sentences.append(f"no estimator beats {YARDSTICK} beyond its confidence interval")
    return sentences


# ---- what is left of it


def report(folder: Path, common: Settings, kinds: Mapping[str, Kind]) -> None:
    """Prints tables and verdicts, draws the figure, writes the numbers."""
    seeds = len(kinds[YARDSTICK].final)
    end = equal_time(kinds)
    final = {name: kind.final for name, kind in kinds.items()}
    in_time = {name: kind.at(end)[:, 0] for name, kind in kinds.items()}
    by_steps, by_time = differences(final), differences(in_time)
    means = {name: t_interval(losses, CONFIDENCE) for name, losses in final.items()}

    print(f"\nequal steps: held-out bits per byte after {common.steps} steps")
    print_table(
        ("held-out", f"{CONFIDENCE:.0%} interval"),
        {name: [digits(mean.mean), ends(mean)] for name, mean in means.items()},
        by_steps,
    )
    print("\n".join(verdict(by_steps, seeds)))
    print(
        f"\nequal time: validation loss after {end[0]:.4g} s on {cores()} cores, the step times "
        "taken as exact"
    )
    exact = kinds[YARDSTICK].step_seconds
    print_table(
        ("ms/step", "ratio", "loss"),
        {
            name: [
                f"{1000 * kind.step_seconds:.1f}",
                f"{kind.step_seconds / exact:.2f}",
                digits(np.mean(in_time[name])),
            ]
            for name, kind in kinds.items()
        },
        by_time,
    )
    print("\n".join(verdict(by_time, seeds)))

    for path in figures.save(draw(kinds), folder, "estimators"):
        print(f"figure: {path}")
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
        "about": " ".join((__doc__ or "").split()),
        "unit": "bits per byte; one number per seed in each list of losses",
        "confidence": CONFIDENCE,
        "confidence_of_each_difference": confidence_of_each(len(kinds)),
        "equal_time_seconds": end[0],
        "timed_on_cores": cores(),
        "settings": shared(common),
        "results": results,
        **{name: value for name, value in run_folder.origin().items() if name != "command"},
    }
    run_folder.write_json(folder / "estimators.json", content)


def print_table(
    titles: Sequence[str], cells: Mapping[str, Sequence[str]], found: Mapping[str, Interval]
) -> None:
    """A row per estimator: its cells, and its difference to the yardstick."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)  # fits into 80 columns
    table.add_column("estimator", no_wrap=True)
    confidence = f"{100 * confidence_of_each(len(cells)):.3g}%"
    for title in (*titles, f"to {YARDSTICK}", f"{confidence} interval"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, row in cells.items():
        one = found.get(name)
        table.add_row(
            name, *row, *(("", "") if one is None else (digits(one.mean, "+"), ends(one, "+")))
        )
    Console(highlight=False).print(table)


def digits(value: Values | np.floating[Any], sign: str = "") -> str:
    """A loss or a difference of two."""
    return "n/a" if np.isnan(value) else f"{value:{sign}.4f}"


def ends(interval: Interval, sign: str = "") -> str:
    """Those of an interval, where there is one."""
    if np.isnan(interval.low):
        return "n/a"
    return f"{digits(interval.low, sign)} to {digits(interval.high, sign)}"


def draw(kinds: Mapping[str, Kind]) -> Figure:
    """The curves by steps and by time."""
    exact = kinds[YARDSTICK]
    by_steps, by_time = Comparison({}, {}), Comparison({}, {})
    for name, kind in kinds.items():
        mean = t_interval(kind.losses, CONFIDENCE)
        by_steps.loss[name] = Curve(kind.steps, mean)
        by_time.loss[name] = Curve(kind.seconds, mean)
        if kind is exact:
            continue
        by_steps.difference[name] = Curve(
            kind.steps, t_interval(kind.losses - exact.losses, CONFIDENCE)
        )
        times = shared_times(kind.seconds, exact.seconds)
        if len(times):
            by_time.difference[name] = Curve(
                times, t_interval(kind.at(times) - exact.at(times), CONFIDENCE)
            )
    seeds = len(exact.final)
    about = f"line: mean of {seeds} seeds    band: {CONFIDENCE:.0%} interval at each point"
    return figures.estimators(by_steps, by_time, YARDSTICK, about if seeds > 1 else "one seed")


def shared_times(some: Values, exact: Values) -> Values:
    """Times at which both curves are known: those of exact's tests and the end of the shorter.

    Straight lines between the tests of a curve that falls are above it. Were both curves' tests
    taken, the difference would jump from one to the other.
    """
    start, end = max(some[0], exact[0]), min(some[-1], exact[-1])
    inside = exact[(exact >= start) & (exact < end)]
    return np.append(inside, end) if start <= end else inside


def shared(common: Settings) -> dict[str, Any]:
    """The settings of all runs, without what only this machine knows where it is."""
    left_out = {*SETTLED, "out"} - {"feed_forward"}
    settings = {name: v for name, v in common.to_dict().items() if name not in left_out}
    return {**settings, "data": [Path(path).name for path in common.data]}


def listed(values: Values) -> list[float | None]:
    """Numbers ready for JSON, which has no NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def to_dict(interval: Interval | None) -> dict[str, float | None] | None:
    """An interval ready for JSON."""
    return interval and dict(zip(interval._fields, listed(np.array(interval)), strict=True))


if __name__ == "__main__":
    sys.exit(main())
