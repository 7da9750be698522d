"""Checks of arguments, one function for each kind.

A message reads `owner: argument must ..., got ...`, the owner being a class or a function. A value
of another type raises TypeError, one out of range ValueError, and a tensor of another shape, dtype
or device RuntimeError.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self

_SHORT = (bool, int, float, complex, str, Decimal, numbers.Number, torch.dtype, torch.device)

Value = TypeVar("Value")

_PLAIN = (Tensor, nn.Parameter)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def shown(value: object) -> str:
    """A value as messages show it: the value itself if that is short, else its type."""
    if value is None or isinstance(value, _SHORT):
        return repr(value)
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} of shape {list(value.shape)}"
    if isinstance(value, list | tuple) and all(isinstance(item, _SHORT) for item in value):
        return repr(value)
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def check_integer(owner: str, argument: str, value: int) -> None:
    """Raises TypeError unless value is an int; a symbolic one is."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{owner}: {argument} must be an int, got {shown(value)}")


def check_at_least(owner: str, argument: str, value: int, least: int) -> None:
    """Raises unless value is an int (TypeError) and >= least (ValueError)."""
    check_integer(owner, argument, value)
    # Asked of a symbolic number, a compiler would make a graph for each answer.
    if isinstance(value, int) and value < least:
        raise ValueError(f"{owner}: {argument} must be >= {least}, got {value}")


def check_among(owner: str, argument: str, value: int, most: int) -> None:
    """Raises unless value is an int (TypeError) in [1, most] (ValueError)."""
    check_integer(owner, argument, value)
    if not 1 <= value <= most:
        raise ValueError(f"{owner}: {argument} must be in [1, {most}], got {value}")


def check_number(owner: str, argument: str, value: object) -> None:
    """Raises TypeError unless value is a real number; a numpy scalar is, a bool is not."""
    is_number = isinstance(value, (int, float, torch.SymInt, torch.SymFloat, numbers.Real))
    if not is_number or isinstance(value, bool):
        raise TypeError(f"{owner}: {argument} must be a number, got {shown(value)}")


def check_not_negative(owner: str, argument: str, value: float) -> float:
    """The number, an int or a float; raises unless it is one (TypeError), finite and >= 0."""
    check_number(owner, argument, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{owner}: {argument} must be a finite number >= 0, got {value}")
    return value if type(value) in (int, float) else float(value)


def check_positive(owner: str, argument: str, value: float) -> float:
    """The number, an int or a float; raises unless it is one (TypeError), finite and > 0."""
    check_number(owner, argument, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{owner}: {argument} must be a finite number > 0, got {value}")
    return value if type(value) in (int, float) else float(value)


def check_share(owner: str, argument: str, value: float) -> float:
    """The number, an int or a float; raises unless it is one (TypeError) in [0, 1) (ValueError)."""
    check_number(owner, argument, value)
    if not 0 <= value < 1:
        raise ValueError(f"{owner}: {argument} must be in [0, 1), got {value}")
    return value if type(value) in (int, float) else float(value)


def check_finite(owner: str, argument: str, value: float) -> float:
    """The number, an int or a float; raises unless it is one (TypeError) and finite."""
    check_number(owner, argument, value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{owner}: {argument} must be a finite number, got {value}")
    return value if type(value) in (int, float) else float(value)


def check_flag(owner: str, argument: str, value: bool) -> bool:
    """The flag; raises TypeError unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {argument} must be True or False, got {shown(value)}")
    return value


def check_choice(owner: str, argument: str, value: str, choices: Iterable[str]) -> None:
    """Raises unless value is a string (TypeError) and one of choices (ValueError)."""
    names = tuple(choices)
    if isinstance(value, str) and value in names:
        return
    listed = ", ".join(f'"{name}"' for name in names)
    if isinstance(value, str):
        raise ValueError(f'{owner}: {argument} must be one of {listed}, got "{value}"')
    raise TypeError(f"{owner}: {argument} must be one of {listed}, got {shown(value)}")


def check_backup(owner: str, backup: Sequence[int]) -> tuple[int, ...]:
    """The table as a tuple.

    Raises unless it is a sequence of ints (TypeError) that names another expert for each
    (ValueError).
    """
    if not isinstance(backup, Sequence) or isinstance(backup, str):
        raise TypeError(f"{owner}: backup must be a sequence of ints, got {shown(backup)}")
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


def check_module(owner: str, argument: str, value: object, *, called: bool = True) -> None:
    """Raises TypeError unless value is a module; one with a forward where it is to be called."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{owner}: {argument} must be a module, got {shown(value)}")
    if not called:
        return
    if type(value).forward is nn.Module.forward and "forward" not in vars(value):
        raise TypeError(
            f"{owner}: {argument} must be a module with a forward, got {type(value).__name__}"
        )


def check_experts(owner: str, experts: object) -> None:
    """Raises TypeError unless experts can be called as experts(x, indices, weights)."""
    required = f"{owner}: experts must be called as experts(x, indices, weights)"
    if isinstance(experts, nn.ModuleList | list | tuple):
        raise TypeError(f"{required}, as an ExpertList of the modules is, got {shown(experts)}")
    if isinstance(experts, nn.Module):
        check_module(owner, "experts", experts)
        # That of the class would not know what a wrapper has put in its place.
        if not _takes(experts.forward, 3):
            raise TypeError(f"{required}, as an ExpertList of modules is, got {shown(experts)}")
    elif isinstance(experts, type) or not callable(experts) or not _takes(experts, 3):
        raise TypeError(f"{required}, got {shown(experts)}")


def _takes(function: Callable[..., object], number: int) -> bool:
    """Whether the function can be called with so many arguments, if its signature is known."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*[None] * number)
    except TypeError:
        return False
    return True


def check_output(
    owner: str,
    part: str,
    output: object,
    shape: tuple[int, ...],
    names: str,
    device: torch.device,
) -> Tensor:
    """Checks the output of a part of a layer, and returns it.

    Args:
        owner: starts the message.
        part: the argument that the part was given as.
        output: must be a floating tensor.
        shape: must be its shape.
        names: the shape in words, such as "[num_tokens, hidden_size]".
        device: must be its device.

    Raises:
        TypeError: it is not a tensor.
        RuntimeError: it is not floating, or has another shape or device.
    """
    if not isinstance(output, Tensor):
        required = f"a tensor {names}" if shape else f"{names} as a tensor"
        raise TypeError(f"{owner}: {part} must return {required}, got {shown(output)}")
    if output.shape != shape:
        sizes = f"{names} = {list(shape)}" if shape else names
        raise RuntimeError(f"{owner}: {part} must return {sizes}, got shape {list(output.shape)}")
    if not output.is_floating_point():
        raise RuntimeError(f"{owner}: {part} must return floating numbers, got {output.dtype}")
    check_output_device(owner, part, output, device)
    return output


def check_output_device(owner: str, part: str, output: Tensor, device: torch.device) -> None:
    """Raises RuntimeError unless what a part has returned is on the device."""
    if output.device != device:
        raise RuntimeError(
            f"{owner}: {part} must return a tensor on {device}, got one on {output.device}"
        )


def check_kind(
    owner: str,
    argument: str,
    value: object,
    kind: type,
    *,
    example: str = "",
    optional: bool = False,
) -> None:
    """Raises TypeError unless value is an instance of kind, or None where that is optional."""
    if isinstance(value, kind) or (optional and value is None):
        return
    article = "an" if kind.__name__[0] in "AEIO" else "a"
    required = f"{article} {kind.__name__}{' or None' if optional else ''}"
    such_as = f", such as {example}" if example else ""
    raise TypeError(f"{owner}: {argument} must be {required}{such_as}, got {shown(value)}")


def check_callable(owner: str, argument: str, value: object) -> None:
    """Raises TypeError unless value can be called."""
    if not callable(value):
        raise TypeError(f"{owner}: {argument} must be callable, got {shown(value)}")


def check_process_group(owner: str, argument: str, value: ProcessGroup | None) -> None:
    """Raises TypeError unless value is None or what torch.distributed calls a process group."""
    if value is None:
        return
    if torch.distributed.is_available():
        group = torch.distributed.ProcessGroup
        # What a process outside of a new group gets in its place.
        if isinstance(value, group) or value is torch.distributed.GroupMember.NON_GROUP_MEMBER:
            return
    raise TypeError(
        f"{owner}: {argument} must be a ProcessGroup or None, as mesh.get_group() of a DeviceMesh "
        f"is, got {shown(value)}"
    )


def check_device(owner: str, device: torch.device | str | int | None) -> None:
    """Raises unless torch knows the device: TypeError for another type, else ValueError."""
    if isinstance(device, bool) or not isinstance(device, torch.device | str | int | None):
        raise TypeError(f"{owner}: device must be a device or None, got {shown(device)}")
    if isinstance(device, str):
        try:
            torch.device(device)
        except RuntimeError as error:
            raise ValueError(f'{owner}: device must be one of torch, got "{device}"') from error


def check_dtype(owner: str, dtype: torch.dtype | None) -> None:
    """Raises unless dtype is None or one of torch's (TypeError), and floating (ValueError)."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{owner}: dtype must be a torch.dtype or None, got {shown(dtype)}")
    if not dtype.is_floating_point:
        raise ValueError(f"{owner}: dtype must be floating, got {dtype}")


def check_tensor(owner: str, argument: str, value: object) -> None:
    """Raises TypeError unless value is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: {argument} must be a tensor, got {shown(value)}")


def check_token_mask(owner: str, mask: Tensor | None, like: Tensor, dims: int) -> None:
    """Raises unless mask fits the first `dims` dimensions of `like`.

    Raises:
        TypeError: mask is neither None nor a tensor.
        RuntimeError: it is not bool, or has another shape or device.
    """
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{owner}: token_mask must be a tensor or None, got {shown(mask)}")
    if mask.dtype != torch.bool or mask.shape != like.shape[:dims]:
        raise RuntimeError(
            f"{owner}: token_mask must be bool of shape {list(like.shape[:dims])}, "
            f"got {mask.dtype} of shape {list(mask.shape)}"
        )
    if mask.device != like.device:
        raise RuntimeError(f"{owner}: token_mask must be on {like.device}, got {mask.device}")


def check_counts(
    owner: str,
    argument: str,
    counts: Tensor,
    num_experts: int,
    device: torch.device,
    *,
    whole: bool = False,
) -> None:
    """Raises unless counts has a value >= 0 for each expert.

    Args:
        owner: starts the message.
        argument: what the counts are called there.
        counts: [E].
        num_experts: E.
        device: where they must be.
        whole: refuses floating ones.

    Raises:
        TypeError: counts are no tensor.
        RuntimeError: they have another shape or device, or hold no numbers.
        ValueError: one is negative, infinite or NaN; that is seen where reading it costs no wait.
    """
    check_tensor(owner, argument, counts)
    numbers_are = "integers" if whole else "numbers"
    is_counting = counts.dtype in _INTEGERS or (not whole and counts.is_floating_point())
    if not is_counting or counts.shape != (num_experts,):
        raise RuntimeError(
            f"{owner}: {argument} must be {numbers_are} [num_experts] = [{num_experts}], "
            f"got {counts.dtype} of shape {list(counts.shape)}"
        )
    if counts.device != device:
        raise RuntimeError(f"{owner}: {argument} must be on {device}, got {counts.device}")
    if readable(counts):
        wrong = ~((counts >= 0) & counts.isfinite())
        if wrong.any():
            raise ValueError(
                f"{owner}: {argument} must be finite and >= 0, got {counts[wrong][0].item()}"
            )


def readable(tensor: Tensor) -> bool:
    """Whether the values can be looked at: on the CPU, where nothing waits, and by no tracer."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in _PLAIN
        and tensor.device.type == "cpu"
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def check_not_batched(owner: str, argument: str, requirement: str, tensor: Tensor) -> None:
    """Whether the values are one sample's, and not those of a batch of torch.func.vmap.

    Raises:
        RuntimeError: they are a batch's, at whatever depth of transforms.
    """
    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    inner = tensor
    while functorch.is_functorch_wrapped_tensor(inner):
        if functorch.is_batchedtensor(inner):
            raise RuntimeError(f"{owner}: {argument} must {requirement}, got a batch of vmap")
        inner = functorch.get_unwrapped(inner)


class Attribute(Generic[Value]):
    """A part's attribute that is checked whenever it is set, and is kept in `_name`.

    Kept in `__dict__` under its own name, torch.compile of torch 2.11 would read it again.
    """

    def __set_name__(self, owner: type[object], name: str) -> None:
        self._name = name

    @overload
    def __get__(self, module: None, owner: type[object]) -> Self: ...
    @overload
    def __get__(self, module: object, owner: type[object]) -> Value: ...
    def __get__(self, module: object, owner: type[object]) -> Value | Self:
        return self if module is None else self._of(module)

    def __set__(self, module: object, value: Value) -> None:
        raise NotImplementedError

    def _of(self, module: object) -> Value:
        value: Value = module.__dict__["_" + self._name]
        return value


class Checked(Attribute[Value]):
    """One that is checked whenever it is set.

    Args:
        check: one of the functions above that give the value.
    """

    def __init__(self, check: Callable[[str, str, Value], Value]) -> None:
        self._check = check

    def __set__(self, module: object, value: Value) -> None:
        checked = self._check(type(module).__name__, self._name, value)
        module.__dict__["_" + self._name] = checked


class Fixed(Attribute[Value]):
    """One that is set once, where the module is made.

    Args:
        of: the part of the module that has it, under the same name; None is the module itself.
    """

    def __init__(self, of: str | None = None) -> None:
        self._part = of

    def __set__(self, module: object, value: Value) -> None:
        made = module.__dict__
        if self._part is None and "_" + self._name not in made:
            made["_" + self._name] = value
        elif (fixed := self._of(module)) is not value and not _is_equal(fixed, value):
            raise AttributeError(
                f"{type(module).__name__}: {self._name} must stay {shown(fixed)}, as the module "
                f"was made, got {shown(value)}"
            )

    def _of(self, module: object) -> Value:
        if self._part is None:
            return super()._of(module)
        value: Value = getattr(getattr(module, self._part), self._name)
        return value


def _is_equal(fixed: object, value: object) -> bool:
    # Whether tensors or arrays are equal is no one answer.
    return isinstance(value, _SHORT) and bool(fixed == value)


class Setting(Attribute[Value]):
    """A record of settings, which the module's `_take` replaces."""

    def __set__(self, module: object, value: Value) -> None:
        take = cast(Any, module)._take
        take(**{self._name: value})


class Level(Attribute[float]):
    """A float that is >= 0, kept as None while it has no effect.

    Under torch.compile(dynamic=True) a float is symbolic, and asking whether it is above 0 compiles
    the graph twice; asking whether it is None does not.

    Args:
        neutral: the value that has no effect.
    """

    def __init__(self, neutral: float = 0.0) -> None:
        self._neutral = neutral

    def __set__(self, module: object, value: float) -> None:
        value = check_not_negative(type(module).__name__, self._name, value)
        module.__dict__["_" + self._name] = None if value == self._neutral else value

    def _of(self, module: object) -> float:
        level: float | None = module.__dict__["_" + self._name]
        return self._neutral if level is None else level
