"""All steps of the story in order: what is computed of each, before any of it is told.

No step repeats a formula of the library, so that what is printed is what the library does.
"""

from __future__ import annotations

from dataclasses import dataclass

from walkthrough.decision import Balance, Decision, Pooling, balance, decide, pool
from walkthrough.learning import Gradient, differentiate
from walkthrough.limits import Room, ask_for_a_refusal, fill
from walkthrough.made_up import FIXED_INPUT, vector
from walkthrough.memory import Memory, remember
from walkthrough.ten_tasks import Row, repeat


@dataclass(frozen=True)
class Story:
    """All of it."""

    pooling: Pooling
    decision: Decision
    fixed: Decision
    balance: Balance
    gradient: Gradient
    row: Row
    room: Room
    refusal: str
    memory: Memory


def compute() -> Story:
    """The whole story, in order."""
    pooling = pool()
    row = repeat(pooling.gate_input)
    return Story(
        pooling,
        decide(pooling.gate_input),
        decide(vector(FIXED_INPUT)),
        balance(pooling.gate_input),
        differentiate(pooling.gate_input),
        row,
        fill(row),
        ask_for_a_refusal(pooling.gate_input),
        remember(pooling.gate_input),
    )
