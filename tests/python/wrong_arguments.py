"""Kinds of arguments, what each refuses, and the rows that say of which kind an argument is."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

TENSOR = torch.ones(2)
MODULE = nn.Linear(2, 2)

# What no kind takes but those that say so.
COMMON: dict[str, Any] = {"complex": 1j, "a set": {1}, "a class": dict}

KINDS: dict[str, dict[str, Any]] = {
    "size": {"None": None, "a float": 1.5, "a flag": True, "text": "2", "0": 0, "-1": -1,
             "NaN": math.nan, "a tensor": torch.tensor(2), "a module": MODULE},
    "integer": {"None": None, "a float": 1.5, "a flag": True, "text": "2", "a tensor": TENSOR},
    "number": {"None": None, "text": "1", "a flag": True, "NaN": math.nan, "inf": math.inf,
               "-1": -1, "a tensor": torch.tensor(0.5), "a module": MODULE},
    "flag": {"text": "False", "1": 1, "a tensor": torch.tensor(True), "None": None},
    "name": {"another": "nothing like it", "1": 1, "a tensor": TENSOR, "a list": ["softmax"]},
    "part": {"text": "x", "3": 3, "a tensor": TENSOR},
    "module": {"text": "x", "3": 3, "a tensor": TENSOR, "a function": torch.relu},
    "callable": {"text": "x", "3": 3, "a tensor": TENSOR, "None": None},
    "text": {"1": 1, "None": None, "a tensor": TENSOR, "a module": MODULE},
    "tensor": {"None": None, "text": "x", "3": 3, "a list": [1.0], "a module": MODULE,
               "a complex tensor": torch.zeros(2, dtype=torch.complex64)},
    "device": {"1.5": 1.5, "text": "nowhere"},
    "dtype": {"text": "float32", "an integer dtype": torch.int64, "1": 1},
    "table": {"1": 1, "text": "ab", "too short": (0,), "floats": (1.0, 0.0), "itself": (0, 1)},
}  # fmt: skip


@dataclass
class Case:
    """A constructor or function with arguments that it takes, and the kind of each argument."""

    call: Callable[..., Any]
    owner: str
    good: dict[str, Any]
    kinds: dict[str, str]
    #: Values of a kind that this argument takes all the same, by argument.
    takes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: Owners of the parts that it makes, which check what they are made from.
    parts: tuple[str, ...] = ()
    #: Those that stand for any number of others.
    others: tuple[str, ...] = ()

    def may_lack(self, argument: str) -> bool:
        """Whether None is a value of the argument."""
        default = inspect.signature(self.call).parameters[argument].default
        return self.good.get(argument, default) is None


#: The kind of an argument, from its annotation apart from None.
OF_ANNOTATION = {
    "int": "size",
    "float": "number",
    "bool": "flag",
    "str": "name",
    "nn.Module": "module",
    "torch.device | str": "device",
    "torch.dtype": "dtype",
}
#: Those of which the annotation does not say it.
OF_NAME = {"seed": "integer"}


def by_annotations(part: type, good: dict[str, Any]) -> Case | None:
    """The row of a part whose arguments are of the kinds that their annotations say.

    One with an argument of another kind fails here, and gets a row of its own where the others are.
    None if it has no argument.
    """
    arguments = inspect.signature(part).parameters.values()
    kinds = {
        argument.name: OF_NAME.get(argument.name)
        or OF_ANNOTATION[str(argument.annotation).removesuffix(" | None")]
        for argument in arguments
        if argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
    }
    return Case(part, part.__name__, good, kinds) if kinds else None


def wrong(cases: Sequence[Case]) -> list[Any]:
    """(case, argument, value) of every argument and every value that its kind refuses."""
    return [
        pytest.param(case, argument, value, id=f"{case.owner}-{argument}-{name}")
        for case in cases
        for argument, kind in case.kinds.items()
        for name, value in (KINDS[kind] | COMMON).items()
        if name not in case.takes.get(argument, ())
        if value is not None or not case.may_lack(argument)
    ]


def check_named(case: Case, argument: str, value: object) -> None:
    """The error for this value starts with the owner and names the argument."""
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        case.call(**(case.good | {argument: value}))
    message = str(caught.value)
    owners = "|".join((case.owner, *case.parts))
    assert re.match(rf"^({owners}): (gate\.)?{argument} must ", message), message
    assert ", got " in message, message
