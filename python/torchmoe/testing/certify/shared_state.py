"""State that all layers of a class share by accident."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_MUTABLE = (dict, list, set, Tensor)


def shared_by_default(layer: nn.Module) -> Iterator[tuple[str, str]]:
    """Attributes that are the default value of an argument of their class, which all layers share.

    Yields:
        The module's path and the attribute's name.
    """
    for path, module in layer.named_modules():
        arguments = inspect.signature(type(module).__init__).parameters.values()
        defaults = [a.default for a in arguments if isinstance(a.default, _MUTABLE)]
        for name, value in vars(module).items():
            if any(value is default for default in defaults):
                yield path, name


def same_content(one: object, two: object) -> bool:
    """Whether two values hold the same numbers."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same_content(one[k], two[k]) for k in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(same_content, one, two))
    return bool(one == two)
