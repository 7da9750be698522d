"""Experts one by one in a state dict, and all of a layer stacked into one matrix of each kind."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from torchmoe._checks import check_at_least, shown

# What a gated expert's gate, up and down projections are called, and a plain one's up and down.
_GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_PLAIN = (("up_proj", "down_proj"), ("fc1", "fc2"), ("linear1", "linear2"), ("0", "2"))
_KNOWN = _GATED + _PLAIN

_GATE_UP, _UP, _DOWN = "gate_up_proj", "up_proj", "down_proj"
_KINDS = ("weight", "bias")
_BIAS = {"weight": "", "bias": "_bias"}


class _Key(NamedTuple):
    """Where an entry of one expert belongs."""

    prefix: str  # of the layer's experts, "layers.0.mlp.experts."
    expert: int
    projection: str
    kind: str


def stack_experts(
    state: Mapping[str, Tensor], *, num_experts: int, experts: str = "experts"
) -> dict[str, Tensor]:
    """A state dict whose layers have one matrix for all experts instead of one for each.

    `layers.0.mlp.experts.3.gate_proj.weight` and so on become `layers.0.mlp.experts.gate_up_proj`
    and `layers.0.mlp.experts.down_proj`, which `torchmoe.nn.Experts` and Transformers 5 have. The
    projections may be called gate_proj, up_proj and down_proj, or w1 (the gate), w3 and w2; those
    of experts without a gate up_proj and down_proj, fc1 and fc2, linear1 and linear2, or 0 and 2.
    Everything else stays as it is, the same tensors in the same order.

    Args:
        state: with `weight` [I, H] of gate and up, [H, I] of down, and with or without `bias` [I]
            and [H].
        num_experts: how many each layer has.
        experts: what the list of them is called.

    Returns:
        gate_up_proj [E, 2 * I, H], the gates' rows first, or up_proj [E, I, H]; down_proj
        [E, H, I]; gate_up_proj_bias [E, 2 * I] or up_proj_bias [E, I], and down_proj_bias [E, H]
        where there are biases. Each is a new tensor with the bits of the old ones, in their dtype
        and on their device. They stand where the layer's first entry stood.

    Raises:
        TypeError: num_experts is not an int.
        ValueError: num_experts is below 1; an expert is missing, has a number beyond, or has other
            projections, shapes, dtypes or devices than expert 0; or a layer has both forms.
    """
    check_at_least("stack_experts", "num_experts", num_experts, 1)
    places = {key: found for key in state if (found := _parse(key, experts)) is not None}
    layers: dict[str, dict[_Key, Tensor]] = {}
    for key, place in places.items():
        layers.setdefault(place.prefix, {})[place] = state[key]
    stacked = {prefix: _stacked(prefix, entries, num_experts) for prefix, entries in layers.items()}
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key in places:
            result.update(stacked.pop(places[key].prefix, {}))
            continue
        prefix, _, name = key.rpartition(".")
        if f"{prefix}." in layers and name.removesuffix("_bias") in (_GATE_UP, _UP, _DOWN):
            raise ValueError(
                f"stack_experts: state must have {prefix} in one form, got {key} and experts one "
                "by one"
            )
        result[key] = tensor
    return result


def unstack_experts(
    state: Mapping[str, Tensor],
    *,
    names: Sequence[str] = _GATED[0],
    experts: str = "experts",
) -> dict[str, Tensor]:
    """The inverse of `stack_experts`: a state dict with the matrices of each expert.

    Args:
        state: with gate_up_proj [E, 2 * I, H] or up_proj [E, I, H] and down_proj [E, H, I] of each
            layer, with or without biases.
        names: what the gate, up and down projections are called, or the up and down projections of
            experts without a gate. Of three names such experts take the last two.
        experts: what the list of a layer's experts is called.

    Returns:
        `experts.0.gate_proj.weight` and so on, each a copy, so that it can be saved in any format
        and none shares memory with another.

    Raises:
        TypeError: names is not a sequence of strings.
        ValueError: names has not two or three names, or two where experts have a gate; a layer has
            only one of its two matrices, or matrices that do not fit each other.
    """
    names = _checked_names(names)
    pattern = re.compile(
        rf"((?:.*\.)?{re.escape(experts)}\.)({_GATE_UP}|{_UP}|{_DOWN})(_bias)?", re.DOTALL
    )
    found = {key: match for key in state if (match := pattern.fullmatch(key)) is not None}
    layers: dict[str, dict[str, Tensor]] = {}
    for key, match in found.items():
        layers.setdefault(match[1], {})[match[2] + (match[3] or "")] = state[key]
    unstacked = {prefix: _unstacked(prefix, layer, names) for prefix, layer in layers.items()}
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key in found:
            result.update(unstacked.pop(found[key][1], {}))
        else:
            result[key] = tensor
    return result


def _parse(key: str, experts: str) -> _Key | None:
    """What an entry is if it is one of an expert's."""
    match = re.fullmatch(
        rf"((?:.*\.)?{re.escape(experts)}\.)(\d+)\.(.+)\.(weight|bias)", key, re.DOTALL
    )
    return match and _Key(match[1], int(match[2]), match[3], match[4])


def _stacked(prefix: str, entries: Mapping[_Key, Tensor], num_experts: int) -> dict[str, Tensor]:
    """A layer's matrices and biases by their names in the result."""
    beyond = [place for place in entries if place.expert >= num_experts]
    if beyond:
        raise ValueError(
            f"stack_experts: {_shown(beyond[0])} must be of an expert in [0, {num_experts}), "
            f"got expert {beyond[0].expert}"
        )
    own = [place for place in entries if place.expert == 0]
    projections = {place.projection for place in entries}
    names = next((known for known in _KNOWN if set(known) == projections), None)
    if names is None:
        listed = "; ".join(", ".join(known) for known in _KNOWN)
        raise ValueError(
            f"stack_experts: the experts of {prefix[:-1]} must have the projections {listed}, "
            f"got {', '.join(sorted(projections))}"
        )
    biased = any(place.kind == "bias" for place in own)
    for expert, name, kind in product(range(num_experts), names, _KINDS):
        place = _Key(prefix, expert, name, kind)
        if (place in entries) != (kind == "weight" or biased):
            requirement = "be there" if place not in entries else "have no bias beside others"
            got = "none" if place not in entries else "one"
            raise ValueError(f"stack_experts: {_shown(place)} must {requirement}, got {got}")
        _check_like(place, entries.get(place), entries)
    *into, down = names
    outer = _GATE_UP if len(into) == 2 else _UP
    kinds = _KINDS if biased else _KINDS[:1]
    _check_fit(prefix, entries, into, down, kinds)
    result: dict[str, Tensor] = {}
    for (name, parts), kind in product(((outer, into), (_DOWN, [down])), kinds):
        each = [
            [entries[_Key(prefix, expert, part, kind)] for part in parts]
            for expert in range(num_experts)
        ]
        first = each[0][0]
        rows = first.shape[0]
        whole = first.new_empty((num_experts, len(parts) * rows, *first.shape[1:]))
        for expert, tensors in enumerate(each):
            for i, tensor in enumerate(tensors):
                whole[expert, i * rows : (i + 1) * rows] = tensor.detach()
        result[prefix + name + _BIAS[kind]] = whole
    return result


def _check_like(place: _Key, tensor: Tensor | None, entries: Mapping[_Key, Tensor]) -> None:
    """Every expert's tensor is of expert 0's shape, dtype and device."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"stack_experts: {_shown(place)} must be a tensor, got {shown(tensor)}")
    first = entries[place._replace(expert=0)]
    for what in ("shape", "dtype", "device"):
        expected, actual = getattr(first, what), getattr(tensor, what)
        if actual != expected:
            raise ValueError(
                f"stack_experts: {_shown(place)} must have the {what} of expert 0 "
                f"({_plain(expected)}), got {_plain(actual)}"
            )


def _check_fit(
    prefix: str,
    entries: Mapping[_Key, Tensor],
    into: Sequence[str],
    down: str,
    kinds: Sequence[str],
) -> None:
    """Expert 0's matrices and biases have the sizes of one expert, of one dtype and device."""
    of_down = _Key(prefix, 0, down, "weight")
    matrix = entries[of_down]
    if matrix.dim() != 2:
        raise ValueError(
            f"stack_experts: {_shown(of_down)} must be a matrix, got shape {list(matrix.shape)}"
        )
    hidden, inner = matrix.shape
    sizes = {"weight": (inner, hidden), "bias": (inner,)}
    of_outer = {"weight": (hidden, inner), "bias": (hidden,)}
    for name, kind in product((*into, down), kinds):
        place = _Key(prefix, 0, name, kind)
        tensor, size = entries[place], (of_outer if name == down else sizes)[kind]
        for expected, actual in (
            (list(size), list(tensor.shape)),
            (matrix.dtype, tensor.dtype),
            (matrix.device, tensor.device),
        ):
            if actual != expected:
                raise ValueError(
                    f"stack_experts: {_shown(place)} must be {_plain(expected)} to fit "
                    f"{_shown(of_down)}, got {_plain(actual)}"
                )


def _checked_names(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"unstack_experts: names must be two or three names, got {shown(names)}")
    if len(names) not in (2, 3) or len(set(names)) != len(names):
        raise ValueError(
            f"unstack_experts: names must be two or three different names, got {list(names)}"
        )
    return tuple(names)


def _unstacked(
    prefix: str, layer: Mapping[str, Tensor], names: tuple[str, ...]
) -> dict[str, Tensor]:
    """A layer's entries expert by expert."""
    present = ", ".join(sorted(layer))
    outers = [name for name in (_GATE_UP, _UP) if name in layer]
    if len(outers) != 1 or _DOWN not in layer:
        raise ValueError(
            f"unstack_experts: {prefix[:-1]} must have {_DOWN} and either {_GATE_UP} or {_UP}, "
            f"got {present}"
        )
    down = layer[_DOWN]
    gated = outers[0] == _GATE_UP
    if gated and len(names) != 3:
        raise ValueError(
            f"unstack_experts: names must be three for {prefix}{_GATE_UP}, got {list(names)}"
        )
    if down.dim() != 3:
        raise ValueError(
            f"unstack_experts: {prefix}{_DOWN} must be [num_experts, hidden_size, "
            f"intermediate_size], got shape {list(down.shape)}"
        )
    num_experts, hidden, inner = down.shape
    rows = 2 * inner if gated else inner
    shapes = {
        outers[0]: [num_experts, rows, hidden],
        _DOWN: [num_experts, hidden, inner],
        outers[0] + "_bias": [num_experts, rows],
        _DOWN + "_bias": [num_experts, hidden],
    }
    for name, tensor in layer.items():
        if name not in shapes or list(tensor.shape) != shapes[name]:
            requirement = f"be {shapes[name]}" if name in shapes else f"not be beside {outers[0]}"
            raise ValueError(
                f"unstack_experts: {prefix}{name} must {requirement}, got shape "
                f"{list(tensor.shape)}"
            )
    *into, last = names if gated else names[-2:]
    result: dict[str, Tensor] = {}
    for expert in range(num_experts):
        for stacked, parts in ((outers[0], into), (_DOWN, [last])):
            for (i, part), kind in product(enumerate(parts), _KINDS):
                whole = layer.get(stacked + _BIAS[kind])
                if whole is not None:
                    own = whole[expert].chunk(len(parts))[i].detach()
                    copy = own.clone(memory_format=torch.contiguous_format)
                    result[f"{prefix}{expert}.{part}.{kind}"] = copy
    return result


def _shown(place: _Key) -> str:
    return f"{place.prefix}{place.expert}.{place.projection}.{place.kind}"


def _plain(value: object) -> str:
    """A shape as a list, whatever else as itself."""
    return str(list(value)) if isinstance(value, torch.Size) else str(value)
