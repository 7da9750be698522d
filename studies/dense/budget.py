"""The time that every model is given, in optimizer steps."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import processor
from studies.common.outcome import TIMED_ROUNDS, TIMED_STEPS, step_rounds
from training import corpus, run_folder
from training.run_folder import FolderError, cores
from training.settings import FREE_TO_CHANGE, Settings, SettingsError

FILE = "step_times.json"


@dataclass(frozen=True)
class StepTimes:
    """How long an optimizer step of each model takes, on one machine."""

    rounds: dict[str, list[float]]
    """Seconds, the mean of each round, by the model's name."""
    machine: str
    """Where they were measured, in words."""

    def seconds(self, name: str) -> float:
        """The least of a model's rounds."""
        return min(self.rounds[name])

    def steps(self, budget: float, name: str) -> int:
        """How many steps of a model fit into so many seconds, but one at least."""
        whole = budget / self.seconds(name)
        return max(1, math.floor(whole * (1 + 1e-12)))  # n steps' time holds n steps

    @property
    def unrest(self) -> float:
        """How far a model's median round is above its least, as a share, at the most."""
        return max(statistics.median(some) / min(some) - 1 for some in self.rounds.values())

    def in_words(self) -> str:
        """How they were measured."""
        return (
            f"step times: the least of {TIMED_ROUNDS} rounds of {TIMED_STEPS} steps on "
            f"{self.machine}, all models in turn; the median round is at most "
            f"{self.unrest:.0%} above the least"
        )


def step_times(folder: Path, kinds: Mapping[str, Settings], text: corpus.Text) -> StepTimes:
    """The step times that the folder has, or new ones, which it then has.

    What a run is depends on them: a comparison that goes on must not measure again.

    Args:
        folder: of the comparison.
        kinds: the models by name.
        text: what they read meanwhile.

    Raises:
        SettingsError: the folder has those of other models.
        FolderError: they cannot be read or written.
    """
    path = folder / FILE
    asked = {name: timed_settings(some) for name, some in kinds.items()}
    if path.exists():
        try:
            content = json.loads(path.read_bytes())
            settings, times = content["settings"], StepTimes(content["rounds"], content["machine"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise FolderError(f"--out: {path} does not hold step times: {error}") from error
        if settings != asked:
            raise SettingsError(
                f"--out: {path} has the step times of other models; "
                "these settings need another folder"
            )
        return times
    torch.set_num_threads(cores())
    capability = torch.backends.cpu.get_cpu_capability()
    times = StepTimes(step_rounds(kinds, text), f"{cores()} cores of {processor()} ({capability})")
    run_folder.write_json(
        path,
        {
            "machine": times.machine,
            "rounds": times.rounds,
            "settings": asked,
            **run_folder.versions(),
        },
    )
    return times


def timed_settings(some: Settings) -> dict[str, Any]:
    """The settings that a step's time may depend on, as JSON gives them back."""
    left_out = {*FREE_TO_CHANGE, "steps"} - {"device"}
    kept = {name: value for name, value in some.to_dict().items() if name not in left_out}
    return {**kept, "data": list(some.data)}
