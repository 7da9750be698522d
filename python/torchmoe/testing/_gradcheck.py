"""Checks the gradients of routers and estimators.

`torch.autograd.gradcheck` compares a gradient with finite differences. Around a router this goes
wrong in quiet ways: a step of the finite difference can change which expert a token chooses, and
then the difference measures a jump; a draw of noise differs between two evaluations; float32
parameters drown the difference in rounding. `gradcheck` here takes care of the three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd.gradcheck import GradcheckError
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

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

__all__ = ["UnstableSelectionError", "gradcheck"]

# Attempts to move inputs away from a tie. Each doubles the distance, which starts at ten margins:
# the last moves them by about five thousand margins, half a unit at the default.
_ATTEMPTS = 10
_FIRST_MOVE_IN_MARGINS = 10.0
_MARGIN_IN_STEPS = 100.0

# Ops of torch that turn floats into a choice.
_CHOOSING = frozenset(
    f"aten::{name}"
    for name in (
        "_to_copy",
        "argmax",
        "argmin",
        "bucketize",
        "ge",
        "gt",
        "kthvalue",
        "le",
        "lt",
        "max",
        "min",
        "multinomial",
        "searchsorted",
        "sort",
        "topk",
    )
)


class UnstableSelectionError(RuntimeError):
    """A choice of experts is tied, or changes within a step of the finite difference."""


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


@dataclass
class Observation:
    """What one evaluation decided."""

    decisions: list[tuple[str, Tensor]] = field(default_factory=list)
    gaps: list[Tensor] = field(default_factory=list)
    """[T] for each call of select_experts."""
    replaced_derivatives: set[str] = field(default_factory=set)


class Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every choice that the ops below it make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = Observation()

    def __torch_dispatch__(
        self,
        func: OpOverload[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name
        if name.startswith("torchmoe::") or (name in _CHOOSING and _has_floats((args, kwargs))):
            self.seen.decisions += [
                (name.split("::")[1], leaf.detach().clone())
                for leaf in pytree.tree_leaves(result)
                if isinstance(leaf, Tensor) and not _is_float(leaf)
            ]
        if name == "torchmoe::select_experts":
            self.seen.gaps.append(_gaps(*args, **kwargs))
        elif name == "torchmoe::gate_weights" and kwargs["estimator"] == "straight_through":
            self.seen.replaced_derivatives.add('gate_weights with estimator "straight_through"')
        elif name in ("torchmoe::scale_gradient", "torchmoe::attach_loss"):
            self.seen.replaced_derivatives.add(name.split("::")[1])
        return result


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
        floats = [i for i, value in enumerate(self._arguments) if _is_float(value)]
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
            compare(self._first, seen)
        return outputs

    def leave_ties(self, margin: float) -> None:
        """Moves the inputs until the scores of every token are `margin` apart."""
        originals = list(self._arguments)
        devices = {i: originals[i].device for i in self._movable}
        gap = 0.0
        token: int | None = None
        for attempt in range(_ATTEMPTS + 1):
            self._first = self._observe(self.tensors)[1]
            gap, token = _smallest(self._first.gaps)
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
        outputs = {id(leaf): leaf for leaf in pytree.tree_leaves(result) if _is_float(leaf)}
        return tuple(leaf for leaf in outputs.values() if leaf.requires_grad), observer.seen


def _gaps(
    scores: Tensor,
    top_k: int,
    *,
    selection_bias: Tensor | None = None,
    tie_break: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Tensor:
    """The smallest distance between neighbours among each token's best top_k + 1 scores: [T].

    Equal scores are a tie whatever breaks it, since a step may tell them apart.
    """
    del tie_break
    ranked = scores.detach() if selection_bias is None else scores.detach() + selection_bias
    best = ranked.topk(min(top_k + 1, ranked.shape[-1]), dim=-1).values
    gaps = best[:, :-1] - best[:, 1:]
    # Scores of -inf do not move, and NaN is not for this check to judge.
    gaps = gaps.nan_to_num(nan=torch.inf, posinf=torch.inf)
    if token_mask is not None:
        gaps = gaps.masked_fill(~token_mask.unsqueeze(-1), torch.inf)
    return gaps.amin(dim=-1) if gaps.shape[-1] > 0 else gaps.new_full(gaps.shape[:1], torch.inf)


def _smallest(gaps: Sequence[Tensor]) -> tuple[float, int | None]:
    smallest, token = torch.inf, None
    for of_tokens in gaps:
        if of_tokens.numel() > 0 and of_tokens.min().item() < smallest:
            smallest, token = of_tokens.min().item(), int(of_tokens.argmin())
    return smallest, token


def compare(first: Observation, now: Observation) -> None:
    if len(first.decisions) != len(now.decisions):
        raise UnstableSelectionError(
            "gradcheck: function must make the same choices in every evaluation, got "
            f"{len(now.decisions)} of them after {len(first.decisions)}"
        )
    for (op, before), (_, after) in zip(first.decisions, now.decisions, strict=True):
        if torch.equal(before, after):
            continue
        where = "got another shape"
        if before.shape == after.shape:
            flat = int((before != after).flatten().nonzero()[0])
            token = flat // before.shape[-1] if before.dim() > 1 else flat
            rows = [t.reshape(-1, t.shape[-1]) if t.dim() > 1 else t for t in (before, after)]
            where = (
                f"got {rows[1][token].tolist()} after {rows[0][token].tolist()} for token {token}"
            )
        raise UnstableSelectionError(
            f"gradcheck: {op} must choose the same at every step of the finite difference, "
            f"{where}; the inputs are too close to a tie for this eps"
        )


@contextmanager
def same_draws(seed: int, tensors: Sequence[Tensor]) -> Iterator[None]:
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _has_floats(tree: object) -> bool:
    return any(_is_float(leaf) for leaf in pytree.tree_leaves(tree))


def _to_double(value: object) -> object:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().clone()
    return value
