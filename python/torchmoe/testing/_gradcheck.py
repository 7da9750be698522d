"""Checks the gradients of routers and estimators.

`torch.autograd.gradcheck` compares a gradient with finite differences. Around a router this goes
wrong in quiet ways: a step of the finite difference can change which expert a token chooses, and
then the difference measures a jump; a draw of noise differs between two evaluations; float32
parameters drown the difference in rounding. `gradcheck` here takes care of the three.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.utils import _pytree as pytree

from torchmoe._checks import (
    check_callable,
    check_flag,
    check_integer,
    check_not_negative,
    check_positive,
    shown,
)
from torchmoe.nn._layers import untrained_copy
from torchmoe.nn._sharding import refuse_sharded
from torchmoe.testing._observation import (
    Observation,
    Observer,
    UnstableSelectionError,
    compare,
    is_float,
    same_draws,
    smallest_gap,
)

__all__ = ["gradcheck"]

# Attempts to move inputs away from a tie. Each doubles the distance, which starts at ten margins:
# the last moves them by about five thousand margins, half a unit at the default.
_ATTEMPTS = 10
_FIRST_MOVE_IN_MARGINS = 10.0
_MARGIN_IN_STEPS = 100.0


def gradcheck(
    module_or_function: Callable[..., Any],
    inputs: Tensor | Sequence[Any],
    *,
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    eps: float = 1e-6,
    margin: float | None = None,
    raise_exception: bool = True,
    **options: Any,  # noqa: ANN401 (torch's own)
) -> bool:
    """`torch.autograd.gradcheck`, made safe for functions that choose experts.

    - Everything is computed in float64, on copies: of the inputs and, for a module, of the module.
      What you pass is not changed.
    - The gradients of the inputs and of a module's parameters (those that require a gradient) are
      checked, for every floating-point tensor in the output, however nested.
    - Inputs are moved away from ties. Where a token's scores in `select_experts` are less than
      `margin` apart, the best top_k + 1 of them in order, noise from a fixed seed is added to the
      floating-point inputs, more with each attempt.
    - No evaluation may choose differently from the first. All integers that `torchmoe` ops return,
      and those that torch's topk, sort, argmax, comparisons and other choosing ops make from
      floats, are compared at each step of the finite difference.
    - Every evaluation draws the same random numbers from torch's default generator. The generator's
      state is left alone.

    A straight-through estimator, `scale_gradient` and `attach_loss` replace the derivative on
    purpose: on a function with one of them the check fails, and says so.

    Args:
        module_or_function: a module, or a function of the inputs. A function that uses a module of
            its own must bring it in float64; pass the module itself to have its parameters checked.
            Not compiled.
        inputs: the positional arguments: one tensor, or a sequence. If any floating-point tensor
            among them requires a gradient, those that do are checked, else all of them are.
        kwargs: keyword arguments of the call, not checked.
        seed: of the random draws and of the noise that breaks ties.
        eps: the step of the finite difference.
        margin: smallest allowed distance between a token's scores; 100 * eps by default.
        raise_exception: raise on a wrong gradient instead of returning False.
        **options: for `torch.autograd.gradcheck`: atol, rtol, nondet_tol, fast_mode, ...

    Returns:
        True if the gradients are right; False if not and raise_exception is False.

    Raises:
        GradcheckError: a gradient is wrong (torch.autograd.gradcheck.GradcheckError, a
            RuntimeError).
        UnstableSelectionError: a tie does not go away, or a step changed a choice; the message
            names the token.
        TypeError: an argument has another type, or the module is sharded.
        ValueError: a number is out of range, or nothing to check: no floating-point input, and no
            parameter.
    """
    check_callable("gradcheck", "module_or_function", module_or_function)
    if not isinstance(inputs, Tensor | Sequence) or isinstance(inputs, str):
        raise TypeError(f"gradcheck: inputs must be a tensor or a sequence, got {shown(inputs)}")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"gradcheck: kwargs must be a mapping or None, got {shown(kwargs)}")
    check_integer("gradcheck", "seed", seed)
    check_positive("gradcheck", "eps", eps)
    if margin is not None:
        check_not_negative("gradcheck", "margin", margin)
    check_flag("gradcheck", "raise_exception", raise_exception)
    checked = _Checked(module_or_function, inputs, dict(kwargs or {}), seed)
    checked.leave_ties(_MARGIN_IN_STEPS * eps if margin is None else margin)
    try:
        return torch.autograd.gradcheck(
            checked.evaluate, checked.tensors, eps=eps, raise_exception=True, **options
        )
    except GradcheckError as error:
        if not raise_exception:
            return False
        raise GradcheckError(f"{error}\n{checked.explanation()}") from error


class _Checked:
    """The function under test, on float64 copies, each evaluation compared with the first."""

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Tensor | Sequence[Any],
        kwargs: dict[str, Any],
        seed: int,
    ) -> None:
        self._seed = seed
        self._kwargs = {name: _to_double(value) for name, value in kwargs.items()}
        self._arguments = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        floats = [i for i, value in enumerate(self._arguments) if is_float(value)]
        wanted = [i for i in floats if self._arguments[i].requires_grad] or floats
        self._arguments = [_to_double(value) for value in self._arguments]
        self._positions = wanted
        self._movable = floats
        self.names = [f"inputs[{i}]" for i in wanted]
        self._parameters: list[Tensor] = []
        self._function = function
        if isinstance(function, nn.Module):
            refuse_sharded("gradcheck", "module_or_function", function)
            self._function = untrained_copy(function).double()
            for name, parameter in self._function.named_parameters():
                if parameter.requires_grad:
                    self.names.append(name)
                    self._parameters.append(parameter.detach().clone().requires_grad_())
        if not self.names:
            raise ValueError(
                "gradcheck: inputs must hold a floating-point tensor, or the module a parameter "
                "that requires a gradient, got neither"
            )
        self._first: Observation | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors whose gradients are checked: inputs, then parameters."""
        inputs = [self._arguments[i].detach().requires_grad_() for i in self._positions]
        return (*inputs, *self._parameters)

    def evaluate(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The differentiable outputs for these `tensors`; refuses a choice unlike the first."""
        outputs, seen = self._observe(tensors)
        if self._first is not None:
            compare("gradcheck", self._first, seen)
        return outputs

    def leave_ties(self, margin: float) -> None:
        """Moves the inputs until the scores of every token are `margin` apart."""
        originals = list(self._arguments)
        devices = {i: originals[i].device for i in self._movable}
        gap = 0.0
        token: int | None = None
        for attempt in range(_ATTEMPTS + 1):
            self._first = self._observe(self.tensors)[1]
            gap, token = smallest_gap(self._first)
            if gap >= margin:
                return
            noise = torch.Generator().manual_seed(self._seed + attempt)
            distance = _FIRST_MOVE_IN_MARGINS * margin * 2.0**attempt
            for i in self._movable:
                drawn = torch.randn(originals[i].shape, generator=noise, dtype=torch.float64)
                self._arguments[i] = originals[i] + distance * drawn.to(devices[i])
        raise UnstableSelectionError(
            f"gradcheck: inputs must keep the scores of select_experts {margin:g} apart, got "
            f"{gap:g} for token {token} after {_ATTEMPTS} attempts to move the inputs away from "
            "the tie; check the module or function at other parameters"
        )

    def explanation(self) -> str:
        """What gradcheck's numbers mean, and why a failure may be intended."""
        numbered = ", ".join(f"{i} = {name}" for i, name in enumerate(self.names))
        text = f"Inputs of this check: {numbered}."
        if self._first is not None and self._first.replaced_derivatives:
            ops = ", ".join(sorted(self._first.replaced_derivatives))
            text += (
                f" The function calls {ops}: this deliberately gives another gradient than the "
                "derivative of the forward pass, so finite differences cannot agree with it. Check "
                "the function without it, and compare the replaced gradient with its own formula."
            )
        return text

    def _observe(self, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Observation]:
        arguments = list(self._arguments)
        for position, tensor in zip(self._positions, tensors, strict=False):
            arguments[position] = tensor
        observer = Observer()
        with same_draws(self._seed, tensors), observer:
            if isinstance(self._function, nn.Module):
                names = self.names[len(self._positions) :]
                parameters = dict(zip(names, tensors[len(self._positions) :], strict=True))
                result = torch.func.functional_call(
                    self._function, parameters, tuple(arguments), self._kwargs
                )
            else:
                result = self._function(*arguments, **self._kwargs)
        outputs = {id(leaf): leaf for leaf in pytree.tree_leaves(result) if is_float(leaf)}
        return tuple(leaf for leaf in outputs.values() if leaf.requires_grad), observer.seen


def _to_double(value: object) -> object:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().clone()
    return value
