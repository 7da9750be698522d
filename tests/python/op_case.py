"""The form a test file fills in for its op, and what the checklist of op_harness.py is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import torchmoe  # noqa: F401  registers the ops
from float_types import FLOATS
from situations import SITUATIONS

Inputs = dict[str, Any]
Outputs = tuple[Tensor, ...]
Function = Callable[[Inputs], Outputs]

# A sum of n terms formed in precision eps errs by at most n * eps * sum |terms| / 2 (Higham,
# "Accuracy and Stability", 3.1), for terms of both signs by far less. The terms here are of order
# one, and sum |terms| is at most a few times the largest result; 4 covers that ratio and the few
# roundings besides the sum. Every tolerance of the suite is this number times what eps gives.
C = 4.0


def tolerance(
    expected: Tensor, *, n: int, wide: torch.dtype, stored: torch.dtype, roundings: float = 0.0
) -> float:
    """C * (n * eps(wide) + (1 + roundings) * eps(stored)) * largest magnitude.

    The sum runs in `wide`; the result is rounded once to `stored`, and `roundings` times more
    where an op keeps an intermediate in the storage type.
    """
    finite = expected[torch.isfinite(expected)]
    scale = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
    own = 0.0 if stored == wide else (1.0 + roundings) * torch.finfo(stored).eps
    return C * ((n + 1) * torch.finfo(wide).eps + own) * scale


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits, weights, losses and sums are formed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class ErrorCase:
    """A change to good inputs, and the message it must bring: `op: argument must ..., got ...`."""

    argument: str
    change: Callable[[Inputs], Inputs]
    got: str  # a regular expression for the user's own value
    exception: type[Exception] = RuntimeError

    @property
    def name(self) -> str:
        return f"{self.argument}-{re.sub('[^0-9A-Za-z]+', '_', self.got)}"

    def message(self, op: str) -> str:
        return rf"^{op}: {self.argument} must [\s\S]*, got [\s\S]*{self.got}"


@dataclass(frozen=True)
class Autocast:
    """Under autocast the op casts the inputs `names` to `dtype`, whatever their (float) type."""

    dtype: torch.dtype
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """The form. `make(situation, dtype, **variant)` returns the op's inputs by argument name."""

    name: str
    schema: str
    make: Callable[..., Inputs]
    reference: Callable[..., Tensor | Outputs]
    wrapper: Callable[[Inputs], Any]  # the same call through torchmoe.ops
    situations: tuple[str, ...] = tuple(SITUATIONS)
    variants: tuple[Inputs, ...] = ({},)  # the first one gets the most expensive checks
    dtypes: tuple[torch.dtype, ...] = FLOATS
    result_is_wide: bool = False  # float32 or wider whatever the input, else the input's type
    roundings: float = 0.0  # intermediates kept in the storage type, forward ...
    gradient_roundings: float = 0.0  # ... and in a gradient
    errors: tuple[ErrorCase, ...] = ()
    autocast: Autocast | None = None
    # The private ops, each with inputs for it, that belong to given inputs.
    private: Callable[[Inputs], list[tuple[str, Inputs]]] | None = None
    poison: Callable[[Inputs], Inputs] | None = None  # NaN wherever nothing is routed
    token_input: str | None = None  # [T, ...], and its rows reach only their own rows of the result
    differentiable: tuple[str, ...] = ()
    refuses_gradient: Callable[[Inputs], bool] = field(default=lambda inputs: False)
    # False where the gradient is by definition not the derivative of the value.
    is_derivative: Callable[[Inputs], bool] = field(default=lambda inputs: True)
    # Differentiable inputs whose tangents are refused.
    without_tangent: tuple[str, ...] = ()
    on_cpu_alone: bool = False  # no other device has a kernel
    # What a policy of selective checkpointing is asked about instead, with a gradient to come.
    asked_as: tuple[str, ...] = ()

    def __call__(self, inputs: Inputs) -> Outputs:
        return call(self.name, inputs)

    def expect(self, inputs: Inputs) -> Outputs:
        return as_tuple(self.reference(**inputs))

    def names(self, inputs: Inputs) -> tuple[str, ...]:
        """The differentiable inputs that are there: an optional bias may be None."""
        return () if self.refuses_gradient(inputs) else present(inputs, self.differentiable)

    def with_tangent(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of `names` that forward mode goes by."""
        return tuple(name for name in names if name not in self.without_tangent)


def altered(name: str, change: Callable[[Any], Any]) -> Callable[[Inputs], Inputs]:
    """For an ErrorCase: the inputs with one of them changed."""
    return lambda inputs: inputs | {name: change(inputs[name])}


def as_tuple(result: Tensor | Iterable[Tensor]) -> Outputs:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def overload(name: str) -> Any:
    return getattr(torch.ops.torchmoe, name).default


def by_position(name: str, inputs: Inputs) -> tuple[tuple[Any, ...], Inputs]:
    """Inputs by name as the positional and keyword arguments that opcheck takes."""
    arguments = [a for a in overload(name)._schema.arguments if a.name in inputs]
    return (
        tuple(inputs[a.name] for a in arguments if not a.kwarg_only),
        {a.name: inputs[a.name] for a in arguments if a.kwarg_only},
    )


def bind(name: str, inputs: Inputs) -> Function:
    """The op as a function of inputs shaped like `inputs`: no look at the schema at call time."""
    arguments = [a for a in overload(name)._schema.arguments if a.name in inputs]
    unknown = set(inputs) - {a.name for a in arguments}
    assert not unknown, f"{name} has no argument {unknown}"
    positional = [a.name for a in arguments if not a.kwarg_only]
    keywords = [a.name for a in arguments if a.kwarg_only]
    op = overload(name)

    def function(inputs: Inputs) -> Outputs:
        return as_tuple(op(*[inputs[n] for n in positional], **{n: inputs[n] for n in keywords}))

    return function


def call(name: str, inputs: Inputs) -> Outputs:
    return bind(name, inputs)(inputs)


def present(inputs: Inputs, names: Iterable[str]) -> tuple[str, ...]:
    """Those of `names` that are not None."""
    return tuple(name for name in names if inputs.get(name) is not None)


def map_tensors(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    return {k: change(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def leaves(inputs: Inputs, names: Iterable[str]) -> Inputs:
    """The inputs detached, with fresh leaves that require a gradient under `names`."""
    inputs = map_tensors(inputs, Tensor.detach)
    return inputs | {name: inputs[name].clone().requires_grad_() for name in names}


def cotangents(outputs: Outputs) -> Outputs:
    """Fixed random values to multiply the outputs by, the same for the same shapes."""
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs
    )


def run(function: Function, inputs: Inputs, names: tuple[str, ...]) -> tuple[Outputs, Outputs]:
    """Outputs, and the gradients of their product with `cotangents` for each of `names`.

    A gradient is there and dense, or this fails: None would hang DistributedDataParallel.
    """
    inputs = leaves(inputs, names)
    outputs = function(inputs)
    if not names:
        return outputs, ()
    torch.autograd.backward(outputs, cotangents(outputs))
    grads = tuple(inputs[n].grad for n in names)
    assert all(g is not None and g.layout == torch.strided for g in grads)
    return tuple(y.detach() for y in outputs), grads


def expected_gradients(case: OpCase, inputs: Inputs, names: tuple[str, ...]) -> Outputs:
    """The reference's gradients, its cotangents those of the op (rounded to the op's type)."""
    given = cotangents(case(map_tensors(inputs, Tensor.detach)))
    wide = {n: inputs[n].double() for n in names}
    inputs = leaves(inputs | wide, names)
    outputs = case.expect(inputs)
    if not any(y.requires_grad for y in outputs):
        return tuple(torch.zeros_like(inputs[n]) for n in names)
    grads = torch.autograd.grad(
        outputs, [inputs[n] for n in names], [g.double() for g in given], allow_unused=True
    )
    return tuple(
        torch.zeros_like(inputs[n]) if g is None else g for n, g in zip(names, grads, strict=True)
    )


def assert_close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0.0, atol=atol, equal_nan=True
    )


def assert_same(actual: Outputs, expected: Outputs) -> None:
    """Equal bit for bit, NaN where NaN."""
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0.0, atol=0.0, equal_nan=True)


def has_nan(tensors: Outputs) -> bool:
    return any(bool(t.isnan().any()) for t in tensors)


def strided(tensor: Tensor, style: str) -> Tensor:
    """The same values (for "expanded": the first of them everywhere) under other strides."""
    if tensor.dim() == 0:
        return tensor
    if style == "expanded":
        return tensor[:1].expand(tensor.shape) if tensor.size(0) else tensor
    if style == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    buffer = tensor.new_full((*tensor.shape[:-1], 2 * tensor.size(-1) + 1), 77)
    view = buffer[..., 1::2]
    view.copy_(tensor)
    return view


def id_names(values: Iterable[Any]) -> list[str]:
    """Test names of variants, dtypes and the like."""

    def name(value: Any) -> str:
        if isinstance(value, dict):
            return "-".join(f"{k}={v}" for k, v in value.items()) or "only"
        return str(getattr(value, "name", value)).replace("torch.", "")

    return [name(value) for value in values]
