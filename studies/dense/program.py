"""Is a mixture of experts better than a dense model in the same time on the same machine?

Both are the transformer of train_lm.py. Every model is given the time that the mixture of
train_lm.py takes for --steps steps; how many steps of another model fit into it is measured before
any is trained. Several mixtures and several widths of the dense model are tried, each with its own
learning rate, on one seed of the first text; the training loss decides, so that held-out text has
no part in the choice. The two that are chosen are then trained with other seeds on two texts, for
that time and shorter: the differences are taken seed by seed, at equal time and at equal bytes, and
the losses by length say at which ratio of step times the two are equal.

Stopped and started again, it goes on where it was, with the step times that it had. What else the
machine does meanwhile changes no result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from studies.common import pool
from studies.common.outcome import Outcome, common_settings
from studies.common.program import (
    RESUMABLE,
    add_jobs,
    add_seeds,
    exit_status,
    jobs_at_a_time,
)
from studies.dense import prose
from studies.dense.budget import step_times
from studies.dense.candidates import dense_models, mixtures, plain, selected
from studies.dense.confirmation import DENSE, MIXTURE, Confirmed
from studies.dense.flip import lengths
from studies.dense.report import Study, report
from studies.dense.search import Choice, Train, search
from training import run_folder
from training.corpus import Text
from training.program import USER_ERRORS
from training.settings import Settings, make_parser, read_arguments

DEFAULTS = replace(Settings(), steps=1600, threads=1, out="runs/dense")
# What the comparison chooses itself.
SETTLED = (
    *("feed_forward", "top_k", "shared_experts", "normalize", "lr", "seed", "minutes", "load"),
    "resume",
)
EXAMPLES = """\
examples:
  python -m studies.dense                            two to three hours on two cores
  python -m studies.dense --steps 400 --seeds 3      a quarter of the time for every model
  python -m studies.dense --data book/ --second-data src/
  python -m studies.dense --candidates E8-K2 W512     one mixture and the dense model of its width
"""
SEEDS = 5  # other ones than the one that the models are chosen with


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line and compares."""
    parser = make_parser("python -m studies.dense", __doc__ or "", EXAMPLES, DEFAULTS)
    parser.add_argument(
        "--second-data",
        nargs="+",
        default=(),
        metavar="PATH",
        help="the second text, as --data is the first (default docstrings of the packages that "
        "torch and the training program need)",
    )
    parser.add_argument(
        "--candidates",
        nargs="+",
        default=(),
        metavar="NAME",
        help="which models are tried, such as E16-K2 E16-K2-shared W512 (default all)",
    )
    add_seeds(parser, SEEDS, "of the chosen models, besides the one that they are chosen with")
    add_jobs(parser)
    given = read_arguments(parser, arguments)
    asked = Asked(
        given.pop("candidates"),
        given.pop("second_data"),
        given.pop("seeds"),
        given.pop("jobs", None),
    )
    return exit_status(
        parser,
        partial(compare, asked, given),
        (*USER_ERRORS, pool.RunError),
        RESUMABLE,
    )


@dataclass(frozen=True)
class Asked:
    """What the command line has besides the settings of runs."""

    candidates: tuple[str, ...]
    second_data: tuple[str, ...]
    seeds: int
    jobs: int | None


def compare(asked: Asked, given: Mapping[str, Any]) -> None:
    """Times, chooses, confirms, and reports."""
    common = common_settings(DEFAULTS, given, SETTLED)
    every = {MIXTURE: mixtures(common), DENSE: dense_models(common)}
    sides = selected(every, asked.candidates)
    yardstick = plain(common)
    kinds = {yardstick: every[MIXTURE].first[yardstick]}
    kinds |= {name: some for side in sides.values() for name, some in side.all.items()}
    folder = Path(common.out)
    jobs = jobs_at_a_time(asked.jobs, common.threads)
    with run_folder.locked(folder), pool.workers(jobs) as workers:
        second = asked.second_data or (str(prose.write(folder)),)
        trainers = {
            name: Trainer(name, data, workers)
            for name, data in {"first": common.data, "second": second}.items()
        }
        for name, trainer in trainers.items():
            print(f"{name} text")
            trainer.text.describe(common.context)
        first = trainers["first"]

        print(f"\nstep times of {len(kinds)} models, in turn", flush=True)
        times = step_times(folder, kinds, first.text)
        print(times.in_words())
        budget = (common.steps or 0) * times.seconds(yardstick)
        steps = {name: times.steps(budget, name) for name in kinds}

        print(f"\nthe choice: each model has {budget:.4g} s; its training loss decides")
        tried, chosen = search(sides, steps, first)
        print(f"\nthe comparison: {' and '.join(one.name for one in chosen.values())}")
        texts = {name: confirm(chosen, asked.seeds, trainer) for name, trainer in trainers.items()}
        domains = {name: [*trainer.text.train] for name, trainer in trainers.items()}
        about = " ".join((__doc__ or "").split())
        report(Study(about, common, budget, times, steps, tried, chosen, domains, texts))


@dataclass(frozen=True)
class Trainer:
    """Trains on one text."""

    name: str
    """Of the text."""
    data: tuple[str, ...]
    """Its paths, none for the default one."""
    workers: pool.Workers
    """Who do it."""

    @property
    def text(self) -> Text:
        """The text, which is read once."""
        return pool.load_text(self.data)

    def __call__(self, runs: Sequence[Settings]) -> list[Outcome]:
        """The outcomes of runs, in their order; the folder of each is named by what it is."""
        named = {}
        for some in runs:
            model = Path(some.out)
            name = f"{self.name}-{model.name}-lr{some.lr:g}-seed{some.seed}-steps{some.steps}"
            named[name] = replace(some, data=self.data, out=str(model.with_name(name)))
        outcomes = pool.train_all(named, self.workers, show)
        return [outcomes[name] for name in named]


def show(name: str, outcome: Outcome) -> None:
    """One line for a run that is over."""
    print(
        f"  {name:48s}  training {outcome.tuning_loss:.4f}  held-out {outcome.held_out:.4f}",
        flush=True,
    )


def confirm(chosen: Mapping[str, Choice], seeds: int, train: Train) -> Confirmed:
    """Both models with seeds that they were not chosen with, for all of the time and shorter."""
    wanted = lengths({side: one.settings.steps or 0 for side, one in chosen.items()})
    keys = [
        (side, steps, seed)
        for seed in range(1, 1 + seeds)
        for side in chosen
        for steps in wanted[side]
    ]
    outcomes = train(
        [replace(chosen[side].settings, steps=steps, seed=seed) for side, steps, seed in keys]
    )
    runs: dict[str, dict[int, list[Outcome]]] = {
        side: {steps: [] for steps in some} for side, some in wanted.items()
    }
    for (side, steps, _), outcome in zip(keys, outcomes, strict=True):
        runs[side][steps].append(outcome)
    return Confirmed(runs)
