"""Checks a gradient against the surrogate that a function, router or layer declares."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd.gradcheck import GradcheckError
from torch.utils._python_dispatch import TorchDispatchMode

from torchmoe._checks import check_callable
from torchmoe.testing._derivatives import Derivatives, check_derivatives
from torchmoe.testing._differences import Function
from torchmoe.testing._explanation import explanation
from torchmoe.testing._observation import AVOID_TIES, UnstableSelectionError
from torchmoe.testing._progress import ProgressLines
from torchmoe.testing._subject import Subject

OWNER = "check_surrogate"

# Enough to see an error anywhere.
_GLANCE: dict[str, Any] = {"layouts": ("contiguous",), "directions": 1, "blocks": 0, "entries": 0}


def check_declared(
    function: Callable[..., Any],
    inputs: Tensor | Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    surrogate: Callable[..., Any] | None,
    seed: int,
    eps: float,
) -> None:
    """Raises unless the gradient of a function is the derivative of its surrogate.

    Args:
        function: a module or a function.
        inputs: its positional arguments: one tensor, or a sequence.
        kwargs: its keyword arguments.
        surrogate: see `check_surrogate`.
        seed: of directions and draws.
        eps: the smallest step.

    Raises:
        GradcheckError: the gradient is wrong.
        UnstableSelectionError: the surrogate makes a choice that changes within the smallest step.
        TypeError: the surrogate cannot be called as the function is, or there is none.
        RuntimeError: it returns something else.
    """
    subject = Subject(OWNER, function, inputs, kwargs)
    declared = _declared(function, surrogate)
    _check_signature(function, declared, subject)
    # Evaluated at the point first, then next to it.
    constants = _Constants()

    def learner(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return subject.outputs(tensors)

    def values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _named(subject.outputs(tensors, declared), names)

    def held(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with constants.again():
            return values(tensors)

    names = _common_outputs(learner(subject.tensors), subject.outputs(subject.tensors, declared))
    # Two ways to say the same: what the surrogate's gradient is, and what it is the derivative of.
    own = sampled(held, values, subject, names, seed, eps, **_GLANCE)
    if own.disagreements:
        text = explanation(OWNER, own, "that of the surrogate's own derivative")
        raise GradcheckError(
            f"{text}\nThis is the gradient of the surrogate itself: what is held constant in it "
            "must be marked by .detach(), and its ops must have right gradients."
        )
    result = sampled(held, learner, subject, names, seed, eps)
    if result.disagreements:
        raise GradcheckError(explanation(OWNER, result, "the derivative of the surrogate"))


def sampled(
    function: Function,
    gradient_of: Function,
    subject: Subject,
    names: Sequence[str],
    seed: int,
    eps: float,
    **numbers: Any,  # noqa: ANN401 (of probes)
) -> Derivatives:
    """`check_derivatives` of a subject whose op that replaces the derivative is what is checked.

    Raises:
        UnstableSelectionError: a choice changes within the smallest step, and nothing else is
            found.
    """
    result = check_derivatives(
        function,
        subject.tensors,
        gradient_of=gradient_of,
        outputs=names,
        seed=seed,
        smallest_step=eps,
        place=subject.place,
        progress=ProgressLines(OWNER),
        **numbers,
    )
    unstable = [u.reason for u in result.undecided if u.kind == "choice"]
    if unstable and not result.disagreements:
        raise UnstableSelectionError(f"{OWNER}: {unstable[0]}; {AVOID_TIES}")
    return replace(result, replaced=set())


def _declared(
    function: Callable[..., Any], surrogate: Callable[..., Any] | None
) -> Callable[..., Any]:
    """The surrogate, a module's as one of the module and its arguments."""
    if surrogate is not None:
        check_callable(OWNER, "surrogate", surrogate)
        return surrogate
    if isinstance(function, nn.Module) and callable(getattr(function, "surrogate", None)):
        return _method
    raise TypeError(
        f"{OWNER}: surrogate must be given for what has no method of that name, as a function of "
        f"the same arguments whose gradient is the declared one, got None for {_name(function)}"
    )


def _method(module: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (the module's own)
    return module.surrogate(*args, **kwargs)


def _check_signature(
    function: Callable[..., Any], declared: Callable[..., Any], subject: Subject
) -> None:
    """Raises TypeError unless the surrogate takes what the function is called with."""
    is_module = isinstance(function, nn.Module)
    is_method = declared is _method
    asked = function.surrogate if is_method else declared  # type: ignore[attr-defined]
    first = ["module"] if is_module and not is_method else []
    arguments = [*first, *subject.arguments]
    try:
        signature = inspect.signature(asked)
    except (TypeError, ValueError):
        return  # one that does not tell
    try:
        signature.bind(*arguments, **subject.kwargs)
    except TypeError:
        forward = function.forward if isinstance(function, nn.Module) else function
        called = ", ".join(
            [*first, *_argument_names(forward, subject), *(f"{k}=" for k in subject.kwargs)]
        )
        taken = ", ".join(signature.parameters)
        raise TypeError(
            f"{OWNER}: surrogate must be called as surrogate({called}), like the "
            f"{'module' if is_module else 'function'}, got surrogate({taken})"
        ) from None


def _argument_names(function: Callable[..., Any], subject: Subject) -> list[str]:
    """What the function calls its positional arguments, as far as it tells."""
    given = len(subject.arguments)
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        names = []
    return [*names, *(f"inputs[{i}]" for i in range(len(names), given))][:given]


def _common_outputs(outputs: Mapping[str, Tensor], declared: Mapping[str, Tensor]) -> list[str]:
    """The names of the function's outputs that the surrogate returns, which come first."""
    wanted = [list(y.shape) for y in outputs.values()]
    got = [list(y.shape) for y in declared.values()]
    if not got or wanted[: len(got)] != got:
        raise RuntimeError(
            f"{OWNER}: surrogate must return the function's outputs, or the first of them, of "
            f"shapes {wanted}, got shapes {got}"
        )
    return list(outputs)[: len(got)]


def _named(outputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    return dict(zip(names, outputs.values(), strict=True))


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


class _Constants(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives detached tensors the values that they have at the first evaluation.

    A gradient treats what is detached as a constant. With this a difference does so too.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values: list[Tensor] = []
        self._next = 0

    def again(self) -> _Constants:
        """To be entered for the next evaluation."""
        self._next = 0
        return self

    def __torch_dispatch__(
        self,
        func: OpOverload[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if func is not torch.ops.aten.detach.default:
            return func(*args, **(kwargs or {}))
        if self._next == len(self._values):
            self._values.append(func(args[0]).clone())
        self._next += 1
        return func(self._values[self._next - 1])
