"""Initial values that do not depend on how a module's tensors are held.

A module draws its parameters one by one from torch's generator. If they are sharded or parametrized
afterwards, they must still have the same values: those that one process draws, in the tensors that
the module made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchmoe.nn._part import evaluating
from torchmoe.nn._sharding import full, is_sharded


def reset(part: object) -> None:
    """Calls reset_parameters of any part that has one, on whole tensors."""
    if not callable(own := getattr(part, "reset_parameters", None)):
        return
    if isinstance(part, nn.Module):
        with whole_tensors(*_modules(part)):
            own()
    else:
        own()


def reset_all(module: nn.Module) -> None:
    """Resets the module and every module inside, one after the other."""
    for part in _modules(module):
        reset(part)


@contextmanager
def whole_tensors(*modules: nn.Module) -> Iterator[None]:
    """Inside the block the modules' own tensors are plain ones that can be filled.

    A sharded parameter (a DTensor, as `fully_shard` makes them) is whole on every process, which
    takes as much memory as their forward pass does. When the block ends each process gets
    its part of what the first process of the mesh holds; all processes must enter. A parametrized
    tensor is the one in front of which the parametrization was put; it goes through those that have
    a `right_inverse`, as at their registration, and no parameter of theirs changes.

    Where nothing is sharded or parametrized, and on the meta device, the block is as without.
    """
    sharded: dict[Tensor, nn.Parameter] = {}
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    parametrized: list[tuple[parametrize.ParametrizationList, Tensor, Tensor]] = []
    classes: list[tuple[nn.Module, type]] = []
    try:
        for part in modules:
            for name, parameter in part._parameters.items():
                if parameter is not None and is_sharded(parameter):
                    if parameter not in sharded:
                        whole = full(parameter.detach())
                        sharded[parameter] = nn.Parameter(whole, parameter.requires_grad)
                    swapped.append((cast(dict[str, Any], part._parameters), name, parameter))
                    part._parameters[name] = sharded[parameter]
            values = {}
            for name, held in _parametrizations(part).items():
                before = _before_parametrization(part, name, held)
                # Draws follow the order in memory, which a computed tensor may have another of.
                value = before.clone(memory_format=torch.contiguous_format)
                values[name] = nn.Parameter(value, value.is_floating_point())
                parametrized.append((held, before, values[name]))
            if values:
                # An attribute of the class hides the property by which torch computes the tensor.
                cls = type(part)
                classes.append((part, cls))
                part.__class__ = type(cls.__name__, (cls,), values)
            for name in _recomputed(part):
                # The hook that computes it runs before the next forward pass.
                swapped.append((part.__dict__, name, part.__dict__[name]))
                part.__dict__[name] = part._parameters[f"{name}_orig"]
        yield
    finally:
        for part, cls in reversed(classes):
            part.__class__ = cls
        for holder, name, tensor in reversed(swapped):
            holder[name] = tensor
    for tensor, filled in sharded.items():
        _write(tensor, filled)
    for held, before, value in parametrized:
        _write_originals(held, before, value)


def _modules(module: nn.Module, seen: set[nn.Module] | None = None) -> Iterator[nn.Module]:
    """The module and those inside, without the parametrizations of their tensors."""
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    yield module
    for name, child in module.named_children():
        if name != "parametrizations" or not parametrize.is_parametrized(module):
            yield from _modules(child, seen)


def _parametrizations(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """Those that are not hidden by a block around this one, by the name of their tensor."""
    if not parametrize.is_parametrized(module):
        return {}
    held = cast(dict[str, parametrize.ParametrizationList], module.parametrizations)
    return {
        name: value
        for name, value in held.items()
        if isinstance(getattr(type(module), name, None), property)
    }


@torch.no_grad()
def _before_parametrization(
    module: nn.Module, name: str, held: parametrize.ParametrizationList
) -> Tensor:
    """The tensor that the parametrizations were registered on, whole."""
    if not any(hasattr(parametrization, "right_inverse") for parametrization in held):
        return full(held.original)
    # In training spectral_norm would take a step.
    with evaluating(held):
        return full(cast(Tensor, getattr(module, name)))


@torch.no_grad()
def _write_originals(held: parametrize.ParametrizationList, before: Tensor, value: Tensor) -> None:
    """What registering the parametrizations on the value makes of it."""
    names = ["original"] if held.is_tensor else [f"original{i}" for i in range(held.ntensors)]
    originals = [cast(Tensor, getattr(held, name)) for name in names]
    if value.is_meta:
        return
    # The inverse would round what was not filled. Processes that draw different values must not
    # decide that each for itself.
    if not any(is_sharded(original) for original in originals) and torch.equal(before, value):
        return
    inverse: Any = value.detach()
    for parametrization in reversed(list(held)):
        if hasattr(parametrization, "right_inverse"):
            try:
                inverse = cast(Any, parametrization).right_inverse(inverse)
            except NotImplementedError:  # by which torch, too, means the identity
                continue
    for original, values in zip(originals, [inverse] if held.is_tensor else inverse, strict=True):
        _write(original, values)


@torch.no_grad()
def _write(tensor: Tensor, values: Tensor) -> None:
    """Copies the values, or this process's part of those of the mesh's first process."""
    if tensor.is_meta:
        return
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        held = cast(Any, tensor)
        values = distribute_tensor(values.detach(), held.device_mesh, held.placements)
    tensor.copy_(values)


def _recomputed(module: nn.Module) -> list[str]:
    """Names of tensors that a hook computes from NAME_orig, as torch.nn.utils.prune has them."""
    names = [name.removesuffix("_orig") for name in module._parameters if name.endswith("_orig")]
    return [name for name in names if isinstance(module.__dict__.get(name), Tensor)]
