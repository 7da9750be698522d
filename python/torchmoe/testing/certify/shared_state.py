"""State that all layers of a class share by accident."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_MUTABLE = (dict, list, set, Tensor)


def shared_by_default(layer: nn.Module) -> Iterator[tuple[str, str]]:
    """Attributes and buffers inside the default value of an argument, which all layers share.

    Yields:
        The module's path and the attribute's name.
    """
    for path, module in layer.named_modules():
        shared = {id(value) for default in _defaults(type(module)) for value in _inside(default)}
        for name, value in (vars(module) | module._buffers).items():
            if id(value) in shared:
                yield path, name


def _defaults(kind: type) -> Iterator[object]:
    """The mutable default values of the methods of a class and of those it inherits from."""
    for base in kind.__mro__:
        for function in vars(base).values():
            if inspect.isfunction(function):
                given = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
                yield from (value for value in given if isinstance(value, _MUTABLE))


def _inside(value: object) -> Iterator[object]:
    """The value, and what a container holds."""
    yield value
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | set):
        yield from value


def same_content(one: object, two: object) -> bool:
    """Whether two tensors or containers hold the same elements."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same_content(one[k], two[k]) for k in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(same_content, one, two))
    return bool(one == two)
