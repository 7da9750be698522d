"""Hessian-vector products, and the finite differences of a gradient that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call

from torchmoe.nn import MoE
from torchmoe.testing._observation import Observation, Observer, UnstableSelectionError, compare

Values = dict[str, Tensor]
Function = Callable[[Values], Tensor]  # to a scalar

# The difference over one and two steps errs by the step's fourth power, 1e-19, times a fifth
# derivative, and by the rounding of a gradient over the step, some 1e-11.
STEP = 2e-5
TOLERANCE = 1e-8
ATTEMPTS = 5


def layer_values(moe: MoE, **inputs: Tensor) -> Values:
    """The parameters, by their names, and the inputs."""
    return {name: p.detach() for name, p in moe.named_parameters()} | inputs


def layer_loss(moe: MoE, *, linear: bool = False, **call: Tensor | None) -> Function:
    """A scalar of the layer's output, its auxiliary loss included, as a function of `layer_values`.

    Draws are the same in every evaluation.

    Args:
        moe: the layer.
        linear: the output enters by a sum with fixed factors, else by that and its square.
        call: further arguments of the layer that stay as they are.
    """

    def function(values: Values) -> Tensor:
        inputs = {n: values[n] for n in ("x", "router_input") if n in values}
        parameters = {n: value for n, value in values.items() if n not in inputs}
        torch.manual_seed(1)
        output = functional_call(moe, parameters, (), call | inputs)
        y = output.hidden_states.flatten()
        factors = torch.linspace(-1, 2, len(y), dtype=y.dtype)
        terms = y * factors if linear else y * factors + y.square()
        return terms.sum() + output.aux_loss

    return function


def gradient(function: Function, values: Values, *, create_graph: bool = False) -> Values:
    """Of the function with respect to every value, zeros where it does not depend on one.

    Args:
        function: the function.
        values: leaves that require a gradient, or duals over such.
        create_graph: as in `torch.autograd.grad`.
    """
    grads = torch.autograd.grad(
        function(values),
        list(values.values()),
        create_graph=create_graph,
        materialize_grads=True,
    )
    return dict(zip(values, grads, strict=True))


def reverse_over_reverse(function: Function, values: Values, directions: Values) -> Values:
    """The transposed derivative of the gradient, times the directions."""
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    first = gradient(function, leaves, create_graph=True)
    return gradient(lambda _: inner(first, directions), leaves)


def forward_over_reverse(function: Function, values: Values, directions: Values) -> Values:
    """The derivative of the gradient, times the directions."""
    with forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(value.clone().requires_grad_(), directions[name])
            for name, value in values.items()
        }
        tangents = {
            name: forward_ad.unpack_dual(g).tangent for name, g in gradient(function, duals).items()
        }
        return {
            name: torch.zeros_like(values[name]) if t is None else t.detach()
            for name, t in tangents.items()
        }


class Difference(NamedTuple):
    """Where a gradient was differentiated, and what came of it."""

    values: Values
    directions: Values
    product: Values


def difference_of_gradients(
    function: Function, draw: Callable[[], Values], moved: Iterable[str] | None = None
) -> Difference:
    """The derivative of the gradient times random directions, by a central difference.

    Args:
        function: the function.
        draw: gives the values, and others where a choice changes over the steps next to a tie.
        moved: the values that have a direction; None is all.
    """
    for _ in range(ATTEMPTS):
        values = draw()
        directions = directions_of(values, moved)
        try:
            return Difference(values, directions, _difference(function, values, directions))
        except UnstableSelectionError as error:
            unstable = error
    raise unstable


def _difference(function: Function, values: Values, directions: Values) -> Values:
    seen: list[Observation] = []

    def at(steps: int) -> Values:
        moved = {
            name: (value + steps * STEP * directions[name]).requires_grad_()
            for name, value in values.items()
        }
        with Observer() as observer:
            found = gradient(function, moved)
        seen.append(observer.seen)
        return found

    near, far = ((at(steps), at(-steps)) for steps in (1, 2))
    assert seen[0].decisions
    for others in seen[1:]:
        compare("second_order", seen[0], others)
    return {
        name: (8 * (near[0][name] - near[1][name]) - (far[0][name] - far[1][name])) / (12 * STEP)
        for name in values
    }


def inner(left: Values, right: Values) -> Tensor:
    return torch.stack([(left[name] * right[name]).sum() for name in left]).sum()


def directions_of(values: Values, moved: Iterable[str] | None = None) -> Values:
    """Standard normal values, zeros where a value is not `moved`; None moves all."""
    names = set(values if moved is None else moved)
    return {
        name: torch.randn_like(value) if name in names else torch.zeros_like(value)
        for name, value in values.items()
    }


def assert_same_products(
    actual: Values, expected: Values, names: Iterable[str] | None = None
) -> None:
    """Equal up to the error of a finite difference, for the values `names`; None is all."""
    scale = max(1.0, *(value.abs().max().item() for value in expected.values()))
    for name in expected if names is None else names:
        torch.testing.assert_close(
            actual[name],
            expected[name],
            rtol=0,
            atol=TOLERANCE * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def check_products(
    function: Function, draw: Callable[[], Values], *, moved: Iterable[str] | None = None
) -> Values:
    """Both products equal the finite difference of the gradient.

    Args:
        function: the function.
        draw: gives the values in float64, see `difference_of_gradients`.
        moved: the values in whose directions the gradient is differentiated, where it is that of a
            surrogate in the others; None is all, and then the Hessian is symmetric besides.

    Returns:
        The finite difference.
    """
    values, directions, expected = difference_of_gradients(function, draw, moved)
    assert_same_products(forward_over_reverse(function, values, directions), expected)
    if moved is None:
        assert_same_products(reverse_over_reverse(function, values, directions), expected)
        return expected
    for _ in range(3):
        others = directions_of(values)
        transposed = reverse_over_reverse(function, values, others)
        product = {"along": inner(transposed, directions)}
        assert_same_products(product, {"along": inner(others, expected)})
    return expected
