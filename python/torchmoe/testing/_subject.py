"""A module or function as the checks of derivatives call it: from tensors by name to outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchmoe._checks import shown
from torchmoe.nn._layers import untrained_copy
from torchmoe.nn._sharding import refuse_sharded
from torchmoe.testing._detached_copies import DetachedCopies
from torchmoe.testing._observation import is_float

# Experts in a list, as nn.ModuleList names their parameters.
_LISTED_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")


class Subject:
    """Float64 copies of a module or function and its arguments.

    Args:
        owner: starts the messages.
        function: a module, which is copied, or a function.
        inputs: its positional arguments: one tensor, or a sequence.
        kwargs: its keyword arguments.

    Attributes:
        function: the function, or the module's copy.
        arguments: the positional arguments; `Checked` moves them away from ties.
        kwargs: the keyword arguments.
        floats: the numbers of the floating-point ones.
        positions: the numbers of those that are differentiated: those that require a gradient, or
            all of them where none does.
        parameters: those of the module that require a gradient, by name.

    Raises:
        TypeError: the inputs are neither, or a parameter is sharded.
        ValueError: there is nothing to differentiate.
    """

    def __init__(
        self,
        owner: str,
        function: Callable[..., Any],
        inputs: Tensor | Sequence[Any],
        kwargs: Mapping[str, Any] | None,
    ) -> None:
        if not isinstance(inputs, Tensor | Sequence) or isinstance(inputs, str):
            raise TypeError(f"{owner}: inputs must be a tensor or a sequence, got {shown(inputs)}")
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise TypeError(f"{owner}: kwargs must be a mapping or None, got {shown(kwargs)}")
        self.kwargs = {name: _to_double(value) for name, value in (kwargs or {}).items()}
        given = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        self.floats = [i for i, value in enumerate(given) if is_float(value)]
        self.positions = [i for i in self.floats if given[i].requires_grad] or self.floats
        self.arguments = [_to_double(value) for value in given]
        self.function = function
        self.parameters: dict[str, Tensor] = {}
        if isinstance(function, nn.Module):
            refuse_sharded(owner, "module_or_function", function)
            with DetachedCopies():
                self.function = untrained_copy(function).double()
            for name, parameter in self.function.named_parameters():
                if parameter.requires_grad:
                    self.parameters[name] = parameter.detach().clone()
        if not self.positions and not self.parameters:
            raise ValueError(
                f"{owner}: inputs must hold a floating-point tensor, or the module a parameter "
                "that requires a gradient, got neither"
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is differentiated, by name: inputs, then parameters."""
        inputs = {f"inputs[{i}]": self.arguments[i] for i in self.positions}
        return {**inputs, **self.parameters}

    def outputs(
        self, tensors: Mapping[str, Tensor], function: Callable[..., Any] | None = None
    ) -> dict[str, Tensor]:
        """The floating-point outputs for these tensors, by their place in what is returned.

        Args:
            tensors: by the names of `tensors`.
            function: called in the place of the subject's, a module's as function(module, ...).
        """
        arguments = list(self.arguments)
        for i in self.positions:
            arguments[i] = tensors[f"inputs[{i}]"]
        if isinstance(self.function, nn.Module):
            module = self.function if function is None else _Called(self.function, function)
            prefix = "" if function is None else "module."
            lent = {prefix + name: tensors[name] for name in self.parameters}
            result = torch.func.functional_call(module, lent, tuple(arguments), self.kwargs)
        else:
            result = (function or self.function)(*arguments, **self.kwargs)
        found: dict[int, tuple[str, Tensor]] = {}
        for path, leaf in pytree.tree_flatten_with_path(result)[0]:
            if is_float(leaf):
                found.setdefault(id(leaf), (pytree.keystr(path).lstrip(".") or "output", leaf))
        return dict(found.values())

    def place(self, name: str, entry: tuple[int, ...]) -> tuple[int | None, int | None]:
        """Token and expert that an entry of a tensor belongs to, where that can be told."""
        tensor = self.tensors[name]
        if name not in self.parameters:
            leading = tensor.shape[:-1]
            if not leading or len(entry) < len(leading):
                return None, None
            strides = torch.empty(leading, device="meta").stride()
            return sum(i * s for i, s in zip(entry, strides, strict=False)), None
        listed = _LISTED_EXPERT.search(name)
        if listed is not None:
            return None, int(listed[1])
        by_expert = tensor.dim() > 0 and tensor.shape[0] in self._numbers_of_experts(name)
        return None, entry[0] if by_expert and entry else None

    def _numbers_of_experts(self, name: str) -> set[int]:
        """What the modules around a parameter call their number of experts."""
        path = name.split(".")[:-1]
        assert isinstance(self.function, nn.Module)
        around = [self.function.get_submodule(".".join(path[:i])) for i in range(len(path) + 1)]
        found = {getattr(module, "num_experts", None) for module in around}
        return {number for number in found if isinstance(number, int)}


class _Called(nn.Module):
    """A module's parameters for a function of the module."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self._function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (the module's own)
        """function(module, ...)."""
        return self._function(self.module, *args, **kwargs)


def _to_double(value: Any) -> Any:  # noqa: ANN401 (whatever the function takes)
    return value.detach().double().clone() if is_float(value) else value
