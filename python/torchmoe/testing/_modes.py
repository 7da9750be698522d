"""Checks the other ways to a gradient against plain reverse mode: forward mode, and batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchmoe.testing._derivatives import Disagreement
from torchmoe.testing._differences import Differences, Function, Incoming, Tensors, draw_incoming

# What a mode that is not offered raises: torch's own refusals are of these types.
_REFUSALS = (RuntimeError, TypeError, ValueError)

# Two modes form the same sums in another order.
_ROUNDINGS = 1e4


def check_forward(
    function: Function, tensors: Tensors, outputs: Sequence[str], seed: int
) -> list[Disagreement] | str:
    """Compares forward with reverse mode, along a random direction in each tensor.

    Returns:
        Disagreements, expected being reverse mode; or what forward mode is refused with.
    """
    check = _Modes(function, tensors, outputs, seed)
    return check.or_refusal(check.forward)


def check_batched(
    function: Function, tensors: Tensors, outputs: Sequence[str], seed: int
) -> list[Disagreement] | str:
    """Compares the gradients of two incoming gradients at once, by vmap, with one by one.

    Returns:
        Disagreements, expected being one by one; or what vmap is refused with.
    """
    check = _Modes(function, tensors, outputs, seed)
    return check.or_refusal(check.batched)


class _Modes:
    def __init__(
        self, function: Function, tensors: Tensors, outputs: Sequence[str], seed: int
    ) -> None:
        self._tensors = tensors
        self._outputs = outputs
        self._generator = torch.Generator().manual_seed(seed)
        self._function = Differences(function, tensors, seed)
        self._rtol = _ROUNDINGS * self._function.eps

    def or_refusal(self, check: Callable[[], list[Disagreement]]) -> list[Disagreement] | str:
        try:
            return check()
        except _REFUSALS as refusal:
            return f"{type(refusal).__name__}: {str(refusal).strip().splitlines()[0]}"

    def forward(self) -> list[Disagreement]:
        found = []
        incoming = self._draw()
        gradients = [self._gradient(one) for one in incoming]
        for name, tensor in self._tensors.items():
            drawn = torch.randn(tensor.shape, generator=self._generator, dtype=torch.float64)
            direction = (drawn / drawn.norm()).to(tensor.device, tensor.dtype)
            with forward_ad.dual_level():
                moved = {n: t.detach() for n, t in self._tensors.items()}
                moved[name] = cast(Any, forward_ad).make_dual(moved[name], direction)
                outputs, _ = self._function.evaluate_at(moved)
                tangents = {
                    n: cast(Any, forward_ad).unpack_dual(outputs[n]).tangent for n in self._outputs
                }
            for one, gradient in zip(incoming, gradients, strict=True):
                tangent = tangents[one.output]
                got = 0.0 if tangent is None else float((tangent * one.values).sum())
                product = gradient[name] * direction
                expected, bound = float(product.sum()), self._rtol * float(product.norm())
                bound = max(bound, self._rtol * abs(got))
                if not abs(expected - got) <= bound:
                    found.append(
                        Disagreement(name, (), expected, got, bound, one.output, mode="forward")
                    )
        return found

    def batched(self) -> list[Disagreement]:
        found = []
        pairs = zip(self._draw(), self._draw(), strict=True)
        for pair in pairs:
            output = pair[0].output
            expected = [self._gradient(one) for one in pair]
            leaves = self._leaves()
            outputs, _ = self._function.evaluate_at(leaves)
            given = torch.autograd.grad(
                outputs[output],
                list(leaves.values()),
                torch.stack([one.values for one in pair]),
                allow_unused=True,
                is_grads_batched=True,
            )
            for (name, leaf), both in zip(leaves.items(), given, strict=True):
                got = torch.zeros(2, *leaf.shape).to(leaf) if both is None else both
                wanted = torch.stack([gradient[name] for gradient in expected])
                bound = self._rtol * float(wanted.abs().max()) if wanted.numel() else 0.0
                wrong = ~((got - wanted).abs() <= bound)
                if wrong.any():
                    at = tuple(int(i) for i in wrong.nonzero()[0])
                    values = float(wanted[at]), float(got[at])
                    found.append(Disagreement(name, at[1:], *values, bound, output, mode="batched"))
        return found

    def _draw(self) -> list[Incoming]:
        outputs = {name: self._function.outputs[name] for name in self._outputs}
        return draw_incoming(outputs, ("contiguous",), self._generator)

    def _leaves(self) -> dict[str, Tensor]:
        return {name: tensor.detach().requires_grad_() for name, tensor in self._tensors.items()}

    def _gradient(self, one: Incoming) -> dict[str, Tensor]:
        leaves = self._leaves()
        outputs, _ = self._function.evaluate_at(leaves)
        given = torch.autograd.grad(
            outputs[one.output],
            list(leaves.values()),
            one.values,
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(leaves, given, strict=True))
