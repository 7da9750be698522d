"""Checks first derivatives: what autograd gives, against differences, in samples that tell.

A random direction in a tensor sees an error in any of its entries, at the price of one; where it
finds one, the direction is halved until the entry at fault is left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchmoe.testing._differences import (
    LAYOUTS,
    Differences,
    Function,
    Incoming,
    Jump,
    Measured,
    Tensors,
    draw_incoming,
)
from torchmoe.testing._observation import UnstableSelectionError, changed_choice
from torchmoe.testing._probes import Probe, draw_probes

__all__ = ["Derivatives", "Disagreement", "Undecided", "check_derivatives"]

Progress = Callable[[int, int, float], None]
Place = Callable[[str, tuple[int, ...]], tuple[int | None, int | None]]

# Disagreements of one tensor after which it is left alone.
_ENOUGH = 3
# Smaller steps are tried while one in three makes an error that is too large so much smaller: of
# many kinks some remain until a step is small enough for all.
_SHRINK, _GAIN, _PATIENCE = 4.0, 0.5, 3
# Steps, relative to the one that gave a disagreement, at which it must stand.
_CONFIRMED_AT = (0.7, 0.45)
# A smaller step than so many machine epsilons may not change values in the narrowest type.
_RESOLVED = 16.0
# How exact a gradient can be expected to be, in machine epsilons of the narrowest type.
_ROUNDINGS = 32.0
# A direction that could not tell an error of this share of the gradient says nothing.
_BLIND = 0.1


@dataclass(frozen=True)
class Disagreement:
    """A derivative by autograd that is not the one by differences.

    Attributes:
        name: of the tensor.
        entry: its indices; fewer than dimensions where all below them are meant, () for the tensor.
        expected: the derivative by differences, along a unit direction where entry is no entry.
        got: by autograd.
        bound: the largest distance of the two that rounding explains.
        output: the output whose derivative it is.
        layout: of the gradient that arrived there, see `Incoming`.
        mode: "reverse"; or "forward" or "batched", then compared with reverse mode.
        token: the token that the entry belongs to, where that can be told.
        expert: likewise.
    """

    name: str
    entry: tuple[int, ...]
    expected: float
    got: float
    bound: float
    output: str
    layout: str = "contiguous"
    mode: str = "reverse"
    token: int | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Undecided:
    """A probe that says nothing.

    Attributes:
        name: of the tensor.
        kind: "choice", one changes within the smallest step; "kink", likewise; "rounding", it
            drowns the derivative, as kinks do that are not seen.
        reason: the same in words.
    """

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Derivatives:
    """The result of `check_derivatives`.

    Attributes:
        disagreements: at most three of each tensor; none if the derivatives are right.
        undecided: probes without an answer.
        names: of the tensors that were checked.
        outputs: names of the outputs.
        dtype_eps: machine epsilon of the narrowest type on the way.
        routing: [T, K], the first choice of experts that was seen; None without one.
        replaced: ops that replace the derivative on purpose.
        evaluations: of the function.
    """

    disagreements: list[Disagreement]
    undecided: list[Undecided]
    names: list[str]
    outputs: list[str]
    dtype_eps: float
    routing: Tensor | None
    replaced: set[str] = field(default_factory=set)
    evaluations: int = 0


def check_derivatives(
    function: Function,
    tensors: Tensors,
    *,
    gradient_of: Function | None = None,
    outputs: Sequence[str] | None = None,
    layouts: Sequence[str] = LAYOUTS,
    directions: int = 3,
    blocks: int = 2,
    entries: int = 4,
    seed: int = 0,
    smallest_step: float = 1e-6,
    rtol: float = 1e-6,
    place: Place | None = None,
    progress: Progress | None = None,
) -> Derivatives:
    """Compares gradients with differences, in random directions, blocks and entries.

    A step is as large as rounding, curvature and the choices of experts allow, see `Differences`:
    where a choice changes or a kink is crossed it is made smaller. A disagreement must stand at
    three steps. It is then narrowed down to one entry, by halves.

    Args:
        function: from tensors by name to outputs by name. Pure, except for draws from torch's
            default generator, which are the same in every call.
        tensors: at which to differentiate, floating.
        gradient_of: the function whose gradient is checked, with the same outputs; `function` by
            default.
        outputs: names of those to check, also where no gradient flows; by default those that
            require a gradient. Each is checked by itself.
        layouts: of the incoming gradients, see `Incoming`.
        directions: random directions in each tensor.
        blocks: of random directions in one index of each tensor's first dimension.
        entries: of each tensor, half of them where the gradient is largest.
        seed: of the directions and incoming gradients, and of the draws.
        smallest_step: the least distance that a tensor is moved by.
        rtol: largest relative error; 32 machine epsilons of the narrowest type where that is more.
        place: tells token and expert of a tensor's entry.
        progress: called before every probe, and after the last, with the number of probes done, of
            all probes, and of the seconds that all are expected to take.

    Raises:
        UnstableSelectionError: the two functions, or two calls, choose differently at one point.
        ValueError: no output requires a gradient.
    """
    return _Check(
        function, tensors, gradient_of or function, outputs, layouts, seed, smallest_step, rtol
    ).run((directions, blocks, entries), place or (lambda name, entry: (None, None)), progress)


class _Check:
    def __init__(
        self,
        function: Function,
        tensors: Tensors,
        gradient_of: Function,
        outputs: Sequence[str] | None,
        layouts: Sequence[str],
        seed: int,
        smallest_step: float,
        rtol: float,
    ) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self._differences = Differences(function, self._tensors, seed)
        self._learner = (
            self._differences
            if gradient_of is function
            else Differences(gradient_of, self._tensors, seed)
        )
        self._generator = torch.Generator().manual_seed(seed)
        learned = self._learner.outputs
        names = [n for n, y in learned.items() if y.requires_grad] if outputs is None else outputs
        if not names:
            raise ValueError(
                "function must return a floating-point tensor that requires a gradient, got "
                f"{sorted(learned) or 'none'}"
            )
        self.outputs = list(names)
        self._incoming = draw_incoming(
            {name: learned[name] for name in names}, layouts, self._generator
        )
        self._differences.take(self._incoming)
        self._gradients = self._differentiate()
        self._smallest_step = smallest_step
        self._rtol = max(rtol, _ROUNDINGS * self._differences.eps)
        self._undecided: list[Undecided] = []

    def run(
        self, numbers: tuple[int, int, int], place: Place, progress: Progress | None
    ) -> Derivatives:
        probes = [
            probe
            for name, tensor in self._tensors.items()
            for probe in draw_probes(
                name, tensor, self._gradients[0][name], numbers, self._generator
            )
        ]
        expected = len(probes) * self._seconds()
        found: list[Disagreement] = []
        for done, probe in enumerate(probes):
            if progress is not None:
                progress(done, len(probes), expected)
            if sum(d.name == probe.name for d in found) >= _ENOUGH:
                continue
            disagreement = self._probe(probe, place)
            if disagreement is not None and not any(
                (d.name, d.entry) == (disagreement.name, disagreement.entry) for d in found
            ):
                found.append(disagreement)
        if progress is not None:
            progress(len(probes), len(probes), expected)
        seen = self._learner.seen
        return Derivatives(
            disagreements=found,
            undecided=self._undecided,
            names=list(self._tensors),
            outputs=self.outputs,
            dtype_eps=self._differences.eps,
            routing=seen.routing,
            replaced=seen.replaced_derivatives,
            evaluations=self._differences.evaluations,
        )

    def _seconds(self) -> float:
        """What a probe takes: timed, in the largest tensor."""
        name = max(self._tensors, key=lambda name: self._tensors[name].numel())
        one = torch.ones(1, dtype=torch.float64)
        began = time.perf_counter()
        self._differences.along(name, 0, one, self._smallest_step)
        return time.perf_counter() - began

    def _differentiate(self) -> list[dict[str, Tensor]]:
        """The gradients for each incoming gradient, flat, each by a forward pass of its own."""
        gradients = []
        for one in self._incoming:
            leaves = {n: t.detach().requires_grad_() for n, t in self._tensors.items()}
            outputs, seen = self._learner.evaluate_at(leaves)
            changed = changed_choice(self._learner.seen, seen)
            if changed is not None:
                raise UnstableSelectionError(changed)
            output = outputs[one.output]
            given: Sequence[Tensor | None] = [None] * len(leaves)
            if output.requires_grad:
                given = torch.autograd.grad(
                    output, list(leaves.values()), one.values, allow_unused=True
                )
            gradients.append(
                {
                    name: (torch.zeros(leaf.shape) if g is None else g.detach().cpu())
                    .double()
                    .flatten()
                    for (name, leaf), g in zip(leaves.items(), given, strict=True)
                }
            )
        return gradients

    def _probe(self, probe: Probe, place: Place) -> Disagreement | None:
        measured, step = self._measure(probe)
        if measured is None:
            return None
        wrong = self._wrong(probe, measured)
        for share in _CONFIRMED_AT:
            if wrong.any():
                again = self._differences.along(
                    probe.name, probe.start, probe.direction, share * step
                )
                if isinstance(again, Measured):
                    wrong &= self._wrong(probe, again)
        if not wrong.any():
            return None
        suspects = wrong.nonzero().flatten().tolist()
        # A layout is at fault only where the same values are right in another.
        order = [(LAYOUTS.index(self._incoming[a].layout), a) for a in suspects]
        return self._located(probe, measured, min(order)[1], place)

    def _measure(self, probe: Probe) -> tuple[Measured | None, float]:
        """The derivatives along a probe, at the step at which they are known best."""
        tensor = self._tensors[probe.name].double()
        size = float(tensor.square().mean().sqrt()) or 1.0
        # Where the errors of a formula of sixth order balance, for functions that bend over a
        # change of the tensor by its own size.
        reach = size * math.sqrt(probe.direction.numel())
        eps = self._differences.eps
        smallest = max(self._smallest_step, _RESOLVED * eps * reach)
        step = max(0.2 * eps ** (1 / 7) * reach, smallest)
        best: Measured | None = None
        at = step
        jump: Jump | None = None
        patience = _PATIENCE
        while patience > 0:
            measured = self._differences.along(probe.name, probe.start, probe.direction, step)
            if isinstance(measured, Jump):
                jump = measured
            else:
                before, best = best, measured if best is None else best.best(measured)
                if before is None or bool((best.errors < _GAIN * before.errors).any()):
                    at, patience = step, _PATIENCE
                else:
                    patience -= 1
                lacking = best.errors > self._allowed(probe, best)
                if not (lacking & (best.errors > 2 * best.rounding)).any():
                    break
            if step <= smallest:
                break
            step = max(step / _SHRINK, smallest)
        if best is None:
            assert jump is not None
            self._undecided.append(Undecided(probe.name, jump.kind, jump.reason))
        elif probe.direction.numel() == tensor.numel():
            self._note_rounding(probe, best, reach)
        return best, at

    def _note_rounding(self, probe: Probe, measured: Measured, reach: float) -> None:
        scales = self._scales(probe, measured)
        # A gradient is looked for where a change of the tensor by its own size is seen.
        matters = scales * reach > math.sqrt(self._differences.eps) * self._differences.sizes
        if bool((matters & (measured.errors > _BLIND * scales)).any()):
            reason = "rounding or kinks hide an error of a tenth of the gradient"
            self._undecided.append(Undecided(probe.name, "rounding", reason))

    def _got(self, probe: Probe) -> Tensor:
        """[A]: what autograd gives along a probe."""
        part = slice(probe.start, probe.stop)
        products = [(g[probe.name][part] * probe.direction).sum() for g in self._gradients]
        return torch.stack(products)

    def _scales(self, probe: Probe, measured: Measured) -> Tensor:
        """[A]: how large a derivative along a probe is, whatever its sign and cancellation."""
        part = slice(probe.start, probe.stop)
        products = [(g[probe.name][part] * probe.direction).norm() for g in self._gradients]
        return torch.maximum(torch.stack(products), measured.derivatives.abs().nan_to_num())

    def _allowed(self, probe: Probe, measured: Measured) -> Tensor:
        return self._rtol * self._scales(probe, measured)

    def _wrong(self, probe: Probe, measured: Measured) -> Tensor:
        distance = (measured.derivatives - self._got(probe)).abs()
        # Written so that NaN is wrong.
        return ~(distance <= self._allowed(probe, measured) + measured.errors)

    def _located(self, probe: Probe, measured: Measured, a: int, place: Place) -> Disagreement:
        """Narrows a disagreement for one incoming gradient down, as far as it is seen."""
        part, error = probe, float((measured.derivatives - self._got(probe))[a])
        while part.direction.numel() > 1:
            middle = part.start + part.direction.numel() // 2
            half = part.part(part.start, middle)
            result, _ = self._measure(half)
            if result is None:
                break
            share = float(part.direction[: middle - part.start].norm())
            of_half = float((result.derivatives - self._got(half))[a]) * share
            # A derivative is the sum of its halves': the other need not be measured.
            if math.isnan(of_half) or abs(of_half) >= abs(error - of_half):
                error = of_half / share
                part = half
                if bool(self._wrong(part, result)[a]):
                    probe, measured = part, result
            else:
                share = float(part.direction[middle - part.start :].norm())
                error = (error - of_half) / share
                part = part.part(middle, part.stop)
        if part is not probe:
            result, _ = self._measure(part)
            if result is not None and bool(self._wrong(part, result)[a]):
                probe, measured = part, result
        entry = probe.indices(self._tensors[probe.name].shape)
        token, expert = place(probe.name, entry)
        incoming: Incoming = self._incoming[a]
        return Disagreement(
            name=probe.name,
            entry=entry,
            expected=float(measured.derivatives[a]),
            got=float(self._got(probe)[a]),
            bound=float((self._allowed(probe, measured) + measured.errors)[a]),
            output=incoming.output,
            layout=incoming.layout,
            token=token,
            expert=expert,
        )
