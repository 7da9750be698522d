"""What a comparison with dense models would measure: step times, and how runs end."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from studies.common.outcome import Outcome
from studies.dense.budget import StepTimes
from studies.dense.program import DEFAULTS
from training.settings import Settings

COMMON = replace(DEFAULTS, out="some")


def made_times(**rounds: list[float]) -> StepTimes:
    return StepTimes(rounds, "2 cores of a processor")


def ended(settings: Settings, loss: float, held_out: float = 9.0) -> Outcome:
    record: Any = SimpleNamespace(
        step=settings.steps, loss=loss, bytes=1024 * (settings.steps or 0)
    )
    return Outcome(settings, [record], held_out, 100, 50)
