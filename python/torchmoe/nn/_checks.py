"""The constructors' checks. A message reads `Class: argument must ..., got ...`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import overload

from torch import nn


def check_choice(owner: str, argument: str, value: str, choices: Iterable[str]) -> None:
    """Raises ValueError unless value is one of choices."""
    names = tuple(choices)
    if value not in names:
        listed = ", ".join(f'"{name}"' for name in names)
        raise ValueError(f'{owner}: {argument} must be one of {listed}, got "{value}"')


def check_integer(owner: str, argument: str, value: int) -> None:
    """Raises TypeError unless value is an int."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{owner}: {argument} must be an int, got {value!r}")


def check_at_least(owner: str, argument: str, value: int, least: int) -> None:
    """Raises unless value is an int (TypeError) and >= least (ValueError)."""
    check_integer(owner, argument, value)
    if value < least:
        raise ValueError(f"{owner}: {argument} must be >= {least}, got {value}")


def check_not_negative(owner: str, argument: str, value: float) -> None:
    """Raises ValueError unless value is finite and >= 0."""
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{owner}: {argument} must be a finite number >= 0, got {value}")


def check_share(owner: str, argument: str, value: float) -> None:
    """Raises ValueError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{owner}: {argument} must be in [0, 1), got {value}")


def check_backup(owner: str, backup: Sequence[int]) -> tuple[int, ...]:
    """The table as a tuple; raises unless it names another expert for each (ValueError)."""
    if len(backup) < 2:
        raise ValueError(
            f"{owner}: backup must have an entry for each of two or more experts, got {backup}"
        )
    experts = range(len(backup))
    for expert, other in enumerate(backup):
        check_integer(owner, "backup", other)
        if other not in experts or other == expert:
            raise ValueError(
                f"{owner}: backup must be another expert in [0, {len(backup)}) for every expert, "
                f"got {other} for expert {expert}"
            )
    return tuple(backup)


class Level:
    """A module's float attribute that is >= 0, kept as None in `_name` while it has no effect.

    Under torch.compile(dynamic=True) a float is symbolic, and asking whether it is above 0 compiles
    the graph twice; asking whether it is None does not.

    Args:
        neutral: the value that has no effect.
    """

    def __init__(self, neutral: float = 0.0) -> None:
        self._neutral = neutral

    def __set_name__(self, owner: type[nn.Module], name: str) -> None:
        self._name = name

    @overload
    def __get__(self, module: None, owner: type[nn.Module]) -> Level: ...
    @overload
    def __get__(self, module: nn.Module, owner: type[nn.Module]) -> float: ...
    def __get__(self, module: nn.Module | None, owner: type[nn.Module]) -> float | Level:
        if module is None:
            return self
        level: float | None = module.__dict__["_" + self._name]
        return self._neutral if level is None else level

    def __set__(self, module: nn.Module, value: float) -> None:
        check_not_negative(type(module).__name__, self._name, value)
        module.__dict__["_" + self._name] = None if value == self._neutral else value
