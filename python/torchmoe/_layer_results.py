"""The result of a layer from any library, taken apart by names and by shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

LOGITS = ("router_logits", "logits", "gate_logits")
INDICES = ("indices", "selected_experts", "top_k_index", "topk_indices")
WEIGHTS = ("weights", "routing_weights", "top_k_weights", "topk_weights")
_RECORDS = ("routing",)


def fields_of(result: Any) -> tuple[dict[str, Any], list[Any]]:  # noqa: ANN401
    """The fields of a result that have a name, those of a record in it too, and those without."""
    if isinstance(result, Tensor) or result is None:
        return {}, [result]
    if isinstance(result, Mapping):
        named = dict(result)
    elif hasattr(result, "_fields"):
        named = dict(zip(result._fields, result, strict=True))
    elif dataclasses.is_dataclass(result):
        named = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    elif isinstance(result, tuple | list):
        named = {}
        for value in result:
            if not isinstance(value, Tensor):
                named = fields_of(value)[0] | named
        return named, list(result)
    else:
        attributes = getattr(result, "__dict__", {})
        named = {name: value for name, value in attributes.items() if not name.startswith("_")}
    for record in _RECORDS:
        if record in named and not isinstance(named[record], Tensor):
            named = fields_of(named[record])[0] | named
    return named, []


def sort_out(
    found: dict[str, Tensor | None], fields: tuple[dict[str, Any], list[Any]], experts: int | None
) -> None:
    """Fills in what a tensor can only be by its shape: [T, E] logits, then [T, K] weights, ids."""
    named, loose = fields
    for name, names in (("logits", LOGITS), ("indices", INDICES), ("weights", WEIGHTS)):
        if found[name] is None:
            found[name] = first_named(named, names, is_whole if name == "indices" else is_vector)
    for value in loose:
        if not isinstance(value, Tensor) or value.dim() < 2:
            continue
        if is_whole(value):
            name = "indices"
        elif experts is not None and value.shape[-1] == experts:
            name = "logits"
        else:
            name = "weights"
        if found[name] is None:
            found[name] = value


def flattened(value: Tensor | None) -> Tensor | None:
    """[T, last] of what has more leading dimensions; a scalar of what has one entry."""
    if value is None or value.dim() == 0:
        return value
    return value.reshape(()) if value.numel() == 1 and value.dim() < 2 else value.flatten(0, -2)


def first_named(
    named: Mapping[str, Any], names: tuple[str, ...], kind: Callable[[Any], bool]
) -> Tensor | None:
    return next((named[name] for name in names if kind(named.get(name))), None)


def is_vector(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def is_whole(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)


def is_scalar(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 0
