"""The numerical side of a check of derivatives: central differences that tell how exact they are.

With phi(s) = <G, f(theta + s v)>, G an incoming gradient and v a unit vector, the derivative at 0
is

    d(h) = sum over k = 1, 2, 3 of c_k (phi(k h) - phi(-k h)) / h,  c = (3/4, -3/20, 1/60),

with an error of order h^6. Two values come with it: the distance to the formula of order h^4, which
bounds that error, and the noise of phi, from its fifth and sixth differences (J. Moré and S. Wild,
Estimating computational noise, SIAM J. Sci. Comput. 33, 2011). Steps can therefore be so large that
rounding is small compared with them, even that of a float32 softmax inside a float64 layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchmoe.testing._observation import (
    Observation,
    Observer,
    changed_choice,
    changed_kink,
    same_draws,
)

Tensors = Mapping[str, Tensor]
Function = Callable[[Tensors], Tensors]

LAYOUTS = ("contiguous", "transposed", "expanded")

_SIDES = 3
_SIXTH_ORDER = (3 / 4, -3 / 20, 1 / 60)
_FOURTH_ORDER = (2 / 3, -1 / 12, 0.0)
# What the formula of sixth order makes of a deviation of 1 in each value.
_AMPLIFICATION = math.sqrt(2 * sum(c * c for c in _SIXTH_ORDER))
_SIXTH_DIFFERENCE = (1.0, -6.0, 15.0, -20.0, 15.0, -6.0, 1.0)
_FIFTH_DIFFERENCE = (-1.0, 5.0, -10.0, 10.0, -5.0, 1.0)
# The variance of a difference of order k of independent values is (2 k)! / (k!)^2 times theirs.
_SIXTH_VARIANCE, _FIFTH_VARIANCE = 924.0, 252.0
# The deviation of one rounding, in machine epsilons, and the share of it that is no curvature.
_ROUNDING, _HEARD = 0.25, 1e-3
# Noise of more machine epsilons than this is not rounding: there is a kink within the step.
_EXPLAINED = 4.0
# A bound that thousands of differences stay within.
_DEVIATIONS = 8.0


@dataclass(frozen=True)
class Incoming:
    """A gradient that arrives at one output.

    Attributes:
        output: its name.
        layout: "contiguous"; "transposed", the same elements with the strides of a transposed
            tensor; or "expanded", one element with strides of 0, as `sum().backward()` sends.
        values: in the output's shape, dtype and layout.
    """

    output: str
    layout: str
    values: Tensor


@dataclass(frozen=True)
class Measured:
    """Derivatives along one direction, one for each incoming gradient: [A], float64.

    Attributes:
        derivatives: by differences.
        errors: how far they may be off.
        rounding: the part of that which a smaller step makes larger.
    """

    derivatives: Tensor
    errors: Tensor
    rounding: Tensor

    def best(self, other: Measured) -> Measured:
        """Of each derivative the one that is known better."""
        better = other.errors < self.errors
        return Measured(
            torch.where(better, other.derivatives, self.derivatives),
            torch.where(better, other.errors, self.errors),
            torch.where(better, other.rounding, self.rounding),
        )


@dataclass(frozen=True)
class Jump:
    """Why there is no difference at a step: a choice that changed, or a kink that was crossed."""

    kind: str
    reason: str


def draw_incoming(
    outputs: Tensors, layouts: Sequence[str], generator: torch.Generator
) -> list[Incoming]:
    """Random gradients for each output, in each layout that differs from the ones before it.

    Entries at which an output is infinite get 0: it does not move there.
    """
    drawn = []
    for name, output in outputs.items():
        values = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        one = torch.randn((), generator=generator, dtype=torch.float64)
        infinite = output.detach().isinf()
        values, one = (
            value.to(output.device, output.dtype).masked_fill(infinite, 0)
            if value.dim() == output.dim()
            else value.to(output.device, output.dtype)
            for value in (values, one)
        )
        for layout in layouts:
            if layout == "contiguous":
                drawn.append(Incoming(name, layout, values))
            elif layout == "transposed" and output.dim() >= 2:
                turned = values.transpose(-1, -2).contiguous().transpose(-1, -2)
                if not turned.is_contiguous():
                    drawn.append(Incoming(name, layout, turned))
            elif layout == "expanded" and output.numel() > 1 and not infinite.any():
                drawn.append(Incoming(name, layout, one.expand(output.shape)))
    return drawn


class Differences:
    """Derivatives of a function at a point, along any direction in one of its tensors.

    Args:
        function: from named tensors to named outputs.
        point: where it is differentiated.
        seed: of what the function draws.

    Attributes:
        outputs: the function's at the point.
        seen: what was decided there.
        sizes: [A], the length of the products of outputs and incoming gradients.
        evaluations: of the function so far.
    """

    def __init__(self, function: Function, point: Tensors, seed: int) -> None:
        self._function = function
        self._point = {name: tensor.detach() for name, tensor in point.items()}
        self._seed = seed
        self.sizes = torch.empty(0)
        self.outputs, self.seen = self.evaluate(self._point)
        self._incoming: list[Incoming] = []
        self._row_of = self._center = self._rounded = torch.empty(0)
        self.evaluations = 1

    @property
    def eps(self) -> float:
        """The machine epsilon of the narrowest type on the way."""
        types = [t.dtype for t in (*self._point.values(), *self.outputs.values())]
        return max(torch.finfo(dtype).eps for dtype in (*types, self.seen.narrowest))

    def take(self, incoming: Sequence[Incoming]) -> None:
        """Sets the incoming gradients of the differences to come."""
        self._incoming = list(incoming)
        products = [_product(one, self.outputs) for one in incoming]
        numbers = [torch.full_like(_rows_of(p), a) for a, p in enumerate(products)]
        self._row_of = torch.cat([number.cpu() for number in numbers]).long()
        self._center = self._rows(self.outputs)
        self.sizes = torch.stack([product.norm().cpu() for product in products])
        types = [one.values.dtype for one in incoming]
        self._rounded = torch.tensor([torch.finfo(dtype).eps for dtype in types]) * self.sizes

    def evaluate(self, tensors: Tensors) -> tuple[dict[str, Tensor], Observation]:
        """The outputs and what was decided; with the draws of every other evaluation."""
        return self.evaluate_at({n: t.detach().requires_grad_() for n, t in tensors.items()})

    def evaluate_at(self, leaves: Tensors) -> tuple[dict[str, Tensor], Observation]:
        """The same, with a graph that ends in `leaves`."""
        observer = Observer()
        with same_draws(self._seed, list(leaves.values())), observer:
            outputs = dict(self._function(leaves))
        return outputs, observer.seen

    def along(self, name: str, start: int, direction: Tensor, step: float) -> Measured | Jump:
        """The derivatives along `direction`, or what is in their way.

        Args:
            name: of the tensor that moves.
            start: the flat number of the first entry that moves.
            direction: [n], float64, of length 1: the entries from `start` on.
            step: h; the tensor moves by three of them to both sides.
        """
        tensor = self._point[name]
        move = torch.zeros(tensor.numel(), dtype=torch.float64)
        move[start : start + direction.numel()] = direction
        shaped = move.reshape(tensor.shape).to(tensor.device, tensor.dtype)
        values = {0: self._center}
        for side in (3, -3, 2, -2, 1, -1):
            moved = {**self._point, name: tensor + side * step * shaped}
            outputs, seen = self.evaluate(moved)
            self.evaluations += 1
            changed = changed_choice(self.seen, seen)
            if changed is not None:
                return Jump("choice", changed)
            if changed_kink(self.seen, seen):
                return Jump("kink", "an activation meets its kink within the smallest step")
            values[side] = self._rows(outputs)
        ordered = torch.stack([values[side] for side in range(-_SIDES, _SIDES + 1)])
        return self._measure(ordered, step)

    def _rows(self, outputs: Tensors) -> Tensor:
        """[R]: the products of outputs and incoming gradients, added up in each row of an output.

        `_row_of` says which incoming gradient an element belongs to.
        """
        rows = [_rows_of(_product(one, outputs)) for one in self._incoming]
        return torch.cat([row.cpu() for row in rows])

    def _measure(self, values: Tensor, step: float) -> Measured:
        """From [7, R], the rows at each side, whose sums are phi."""

        def phi(rows: Tensor) -> Tensor:
            zeros = torch.zeros(len(self._incoming), dtype=rows.dtype)
            return zeros.index_add(0, self._row_of, rows)

        def derivative(weights: Sequence[float]) -> Tensor:
            differences = [values[_SIDES + k] - values[_SIDES - k] for k in (1, 2, 3)]
            weighed = [c * d for c, d in zip(weights, differences, strict=True)]
            return phi(torch.stack(weighed).sum(0)) / step

        variances = []
        for weights, variance, start in (
            (_SIXTH_DIFFERENCE, _SIXTH_VARIANCE, 0),
            (_FIFTH_DIFFERENCE, _FIFTH_VARIANCE, 0),
            (_FIFTH_DIFFERENCE, _FIFTH_VARIANCE, 1),
        ):
            column = torch.tensor(weights, dtype=values.dtype).unsqueeze(1)
            rows = (values[start : start + len(weights)] * column).sum(0)
            # Rows are rounded each by itself, or all alike.
            variances.append(torch.maximum(phi(rows.square()), phi(rows).square()) / variance)
        noise = torch.stack(variances).mean(0).sqrt()
        # An output is rounded at least. Where a narrower type on the way is heard, a few rows may
        # make it less loud than it is.
        narrow = _ROUNDING * self.eps * self.sizes
        noise = torch.where(noise > _HEARD * narrow, torch.maximum(noise, narrow), noise)
        noise = torch.maximum(noise, self._rounded)
        best = derivative(_SIXTH_ORDER)
        truncation = (best - derivative(_FOURTH_ORDER)).abs()
        explained = torch.minimum(noise, _EXPLAINED * self.eps * self.sizes)
        scale = _DEVIATIONS * _AMPLIFICATION / step
        return Measured(best, truncation + scale * noise, scale * explained)


def _rows_of(product: Tensor) -> Tensor:
    return (product.sum(-1) if product.dim() >= 2 else product).flatten()


def _product(one: Incoming, outputs: Tensors) -> Tensor:
    output = outputs[one.output].detach().double()
    return one.values.double() * output.masked_fill(output.isinf(), 0)
