"""The order of the tutorials: each takes for granted what those before it say."""

from __future__ import annotations

from pathlib import Path

ORDER = [
    "first_layer.py",
    "what_the_router_learns.py",
    "collapse_and_cures.py",
    "capacity_and_drops.py",
    "gradients_of_your_own_router.py",
    "the_cpp_layer.py",
]


def place(file: str) -> int:
    """Where a tutorial stands; raises ValueError for one that has no place yet."""
    return ORDER.index(Path(file).name)
