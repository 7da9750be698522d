"""What is left of the study: its tables and sentences, its figure and its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from studies.common.intervals import digits, ends, listed, to_dict
from studies.common.result import Result, make_table
from studies.dense.budget import StepTimes
from studies.dense.confirmation import CONFIDENCE, DENSE, MIXTURE, SIDES, Confirmed
from studies.dense.figure import draw
from studies.dense.search import Choice, Tried
from training.settings import Settings

INTERVAL = f"{CONFIDENCE:.0%} interval"


@dataclass(frozen=True)
class Study:
    """All that was found."""

    about: str
    """What the program does."""
    common: Settings
    """Of all runs."""
    budget: float
    """Seconds that every model was given."""
    times: StepTimes
    steps: Mapping[str, int]
    """Of each candidate in that time."""
    tried: Mapping[str, Tried]
    """By candidate."""
    chosen: Mapping[str, Choice]
    """By side."""
    domains: Mapping[str, list[str]]
    """Kinds of text in each text."""
    texts: Mapping[str, Confirmed]
    """By text."""

    @property
    def step_seconds(self) -> dict[str, float]:
        """Of each side's chosen model."""
        return {side: self.times.seconds(one.name) for side, one in self.chosen.items()}

    @property
    def ratio(self) -> float:
        """Time of a step of the mixture over that of a dense one."""
        return self.step_seconds[MIXTURE] / self.step_seconds[DENSE]

    def short(self, side: str) -> str:
        """A side with its model's name."""
        return f"{side} {self.chosen[side].name}"


def report(study: Study) -> None:
    """Prints tables and sentences, draws the figure, writes the numbers."""
    result = Result()
    result.say(
        f"\nchosen: {study.short(MIXTURE)}, {study.short(DENSE)}\n"
        f"held-out: bits per byte, the mean of {in_words(seeds_of(study))}\n"
        f"difference: {MIXTURE} less {DENSE}, seed by seed; below 0: the {MIXTURE} is better"
    )
    result.say_each(
        [f"{name} text: {', '.join(domains)}" for name, domains in study.domains.items()]
    )
    show_equal_time(result, study)
    show_equal_bytes(result, study)
    show_flip(result, study)
    show_chosen(result, study)
    show_tried(result, study)
    figure = draw(study.texts, {side: study.short(side) for side in SIDES}, study.step_seconds)
    result.save(figure, content(study), Path(study.common.out), "dense")


def seeds_of(study: Study) -> int:
    """How many there are of each run."""
    return next(iter(study.texts.values())).seeds


def in_words(seeds: int) -> str:
    """One seed, or several."""
    return f"{seeds} seed{'s' * (seeds > 1)}"


# ---- what is shown


def show_equal_time(result: Result, study: Study) -> None:
    """The losses where each side takes the steps that fit into the time."""
    table = make_table("text", MIXTURE, DENSE, "difference", INTERVAL)
    for name, found in study.texts.items():
        losses = [np.mean(found.losses(side, found.own(side))) for side in SIDES]
        apart = found.at_equal_time()
        table.add_row(name, *map(digits, losses), digits(apart.mean, "+"), ends(apart, "+"))
    steps = ", ".join(f"{side} {study.steps[one.name]}" for side, one in study.chosen.items())
    result.say(f"\nequal time: held-out after {study.budget:.4g} s (steps: {steps})")
    result.show(table)
    result.say_each([verdict(name, found) for name, found in study.texts.items()])


def verdict(name: str, found: Confirmed) -> str:
    """What the difference at equal time says."""
    mean, low, high = found.at_equal_time()
    if np.isnan(low):
        return f"{name}: one seed gives no interval"
    if high < 0:
        return (
            f"{name}: at equal time the {MIXTURE} is better by {-mean:.4f} "
            f"({-high:.4f} to {-low:.4f}) bits per byte"
        )
    if low > 0:
        return (
            f"{name}: at equal time the {MIXTURE} is worse by {mean:.4f} "
            f"({low:.4f} to {high:.4f}) bits per byte"
        )
    return f"{name}: at equal time no difference that {in_words(found.seeds)} can show"


def show_equal_bytes(result: Result, study: Study) -> None:
    """The losses where both sides read the same bytes."""
    table = make_table("text", "steps", "bytes", MIXTURE, DENSE, "difference", INTERVAL)
    for name, found in study.texts.items():
        for steps in found.shared:
            apart = found.at_equal_bytes(steps)
            table.add_row(
                name,
                f"{steps}",
                f"{found.runs[MIXTURE][steps][0].records[-1].bytes:,}",
                *(digits(np.mean(found.losses(side, steps))) for side in SIDES),
                digits(apart.mean, "+"),
                ends(apart, "+"),
            )
    result.say("\nequal bytes: held-out at the end of runs of several lengths")
    result.show(table)


def show_flip(result: Result, study: Study) -> None:
    """The ratio of step times up to which the mixture is better, next to the one measured."""
    table = make_table("text", "measured", "flips at", INTERVAL)
    for name, found in study.texts.items():
        flip = found.flip()
        table.add_row(name, f"{study.ratio:.4f}", digits(flip.mean), ends(flip))
    result.say(
        f"\nratio: time of a step, {MIXTURE} over {DENSE}; below the one at which it flips the "
        f"{MIXTURE}\nis better at equal time"
    )
    result.show(table)
    for name, found in study.texts.items():
        if count := int(np.isnan(found.flips()).sum()):
            result.say(
                f"{name}: in {count} of {in_words(found.seeds)} one side's shortest run is better "
                "than the other's longest, and where it flips is out of reach"
            )


def show_chosen(result: Result, study: Study) -> None:
    """The two models, and every learning rate that they were trained with for all their steps."""
    table = make_table("chosen", "parameters", "active", "ms/step", "steps", "learning rate")
    for side, one in study.chosen.items():
        outcome = study.tried[one.name].outcome
        table.add_row(
            study.short(side),
            f"{outcome.parameters:,}",
            f"{outcome.active_parameters:,}",
            f"{1000 * study.step_seconds[side]:.2f}",
            f"{one.settings.steps}",
            f"{one.settings.lr:g}",
        )
    result.say("\nthe two models")
    result.show(table)
    result.say_each(
        [
            study.times.in_words(),
            *(
                f"{study.short(side)}, training loss by learning rate: {rates_text(one.rates)}"
                for side, one in study.chosen.items()
            ),
        ]
    )


def rates_text(rates: Mapping[float, float]) -> str:
    """The loss of each learning rate."""
    return ", ".join(f"{rate:g} {loss:.4f}" for rate, loss in rates.items())


def show_tried(result: Result, study: Study) -> None:
    """Every candidate: how long its step takes, and what it reached with its learning rate."""
    table = make_table("candidate", "parameters", "active", "ms/step", "steps", "rate", "loss")
    for name, one in study.tried.items():
        outcome = one.outcome
        table.add_row(
            name,
            f"{outcome.parameters:,}",
            f"{outcome.active_parameters:,}",
            f"{1000 * study.times.seconds(name):.2f}",
            f"{study.steps[name]}",
            f"{one.rate:g}",
            digits(np.float64(outcome.tuning_loss)),
        )
    result.say("\nwhat was tried, on one seed of the first text; loss: training text, by which")
    result.show(table)


# ---- what is kept


def content(study: Study) -> dict[str, Any]:
    """The numbers, ready for JSON."""
    left_out = {"out", "threads", "data"}
    settings = {k: v for k, v in study.common.to_dict().items() if k not in left_out}
    return {
        "about": study.about,
        "unit": "bits per byte; one number per seed in each list of losses",
        "confidence": CONFIDENCE,
        "budget_seconds": study.budget,
        "step_time_ratio": study.ratio,
        "step_times": {"machine": study.times.machine, "rounds": study.times.rounds},
        "settings": settings,
        "results": {name: text_content(study, name) for name in study.texts},
        "chosen": {
            side: {
                "name": one.name,
                "steps": one.settings.steps,
                "lr": one.settings.lr,
                "training_loss_by_rate": one.rates,
            }
            for side, one in study.chosen.items()
        },
        "tried": {
            name: {
                "parameters": one.outcome.parameters,
                "active_parameters": one.outcome.active_parameters,
                "steps": study.steps[name],
                "lr": one.rate,
                "training_loss": one.outcome.tuning_loss,
                "training_loss_by_rate_of_a_part": one.rates,
            }
            for name, one in study.tried.items()
        },
    }


def text_content(study: Study, name: str) -> dict[str, Any]:
    """The numbers of one text."""
    found = study.texts[name]
    return {
        "domains": study.domains[name],
        "held_out": {
            side: {steps: listed(found.losses(side, steps)) for steps in sorted(runs)}
            for side, runs in found.runs.items()
        },
        "equal_time": to_dict(found.at_equal_time()),
        "equal_bytes": {steps: to_dict(found.at_equal_bytes(steps)) for steps in found.shared},
        "flip_ratio": to_dict(found.flip()),
        "flip_ratios": listed(np.array(found.flips())),
    }
