"""What a section of the report is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from benchmarks.clock import Clock
from benchmarks.contenders import Shape
from benchmarks.moe_layer import DEFAULT_CASES, Case

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REHEARSED_TOKENS = 128


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    clock: Clock
    quick: bool

    @property
    def cases(self) -> list[Case]:
        """Those that `benchmarks.moe_layer` times; for a rehearsal some, with few tokens."""
        if not self.quick:
            return list(DEFAULT_CASES)
        first, *_, last = DEFAULT_CASES
        few = replace(first.shape, tokens=REHEARSED_TOKENS)
        return [replace(first, shape=few), last]

    @property
    def shapes(self) -> list[Shape]:
        """Those of the training steps among them."""
        return [case.shape for case in self.cases if not case.forward_only]


@dataclass(frozen=True)
class Section:
    """One question and its answer."""

    title: str
    about: str  # a sentence or two: what is measured
    parts: list[str]  # paragraphs and tables
    figures: Mapping[str, Figure] = field(default_factory=dict)  # by the name of their file
