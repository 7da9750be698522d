"""Checks the gradients of routers, experts and layers against finite differences.

`torch.autograd.gradcheck` compares a gradient with finite differences. With a router this fails
silently: a step of the finite difference can change which expert a token chooses, and the
difference then measures a jump; noise differs between two evaluations; in float32 the difference is
lost in rounding. `gradcheck` here handles all three.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from torchmoe._checks import (
    check_callable,
    check_flag,
    check_integer,
    check_not_negative,
    check_positive,
)
from torchmoe.testing._derivatives import Derivatives, Disagreement, check_derivatives
from torchmoe.testing._explanation import explanation
from torchmoe.testing._modes import check_batched, check_forward
from torchmoe.testing._observation import (
    Observation,
    Observer,
    UnstableSelectionError,
    compare,
    same_draws,
    smallest_gap,
)
from torchmoe.testing._progress import ProgressLines
from torchmoe.testing._subject import Subject

__all__ = ["gradcheck"]

# Attempts to move inputs away from a tie. Each doubles the distance, which starts at ten margins:
# the last moves them by about five thousand margins, half a unit at the default.
_ATTEMPTS = 10
_FIRST_MOVE_IN_MARGINS = 10.0
_MARGIN_IN_STEPS = 100.0

_EXPECTED = "the derivative of the output"

_MODES = {"forward": check_forward, "batched": check_batched}


def gradcheck(
    module_or_function: Callable[..., Any],
    inputs: Tensor | Sequence[Any],
    *,
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    eps: float = 1e-6,
    margin: float | None = None,
    full: bool = False,
    check_forward_ad: bool = False,
    check_batched_grad: bool = False,
    raise_exception: bool = True,
    **options: Any,  # noqa: ANN401 (torch's own)
) -> bool:
    """Whether autograd's gradients are the derivatives; safe for functions that make choices.

    With G a random incoming gradient of an output f, v a direction in an input or parameter theta,
    and J = df / dtheta, it compares

        <J^T G, v>, by autograd, with d/ds <G, f(theta + s v)> at s = 0, by finite differences,

    for each floating-point tensor in the output separately, however nested, and for incoming
    gradients that are contiguous, transposed and expanded.

    - The directions v are random ones in the whole tensor, which detect an error in any of its
      entries, rows, and single entries. A direction that finds an error is halved until one entry
      is left. With full=True `torch.autograd.gradcheck` goes through every entry instead.
    - Everything is computed in float64, on copies of the inputs and of the module. What you pass is
      not changed. If values are cast to a narrower type on the way, as in a softmax in float32,
      steps and bounds follow that type; a derivative that is wrong by 3e-4 is still detected.
    - Inputs are moved away from ties. If neighbours among a token's best top_k + 1 scores in
      `select_experts` are less than `margin` apart, noise from a fixed seed is added to the
      floating-point inputs, more with each attempt. The same is done if any choice changes within
      the smallest step.
    - No evaluation may choose differently from the first. All integers that `torchmoe` ops return,
      and those that torch's topk, sort, argmax, comparisons and other choosing ops make from
      floats, are compared at each step of the finite difference.
    - Every evaluation draws the same random numbers from torch's default generator, whose state is
      not changed.
    - A check that takes more than two seconds reports on standard error how long it will take, and
      its progress.

    A straight-through estimator, `scale_gradient` and `attach_loss` replace the derivative on
    purpose: the check fails on a function that has one of them, and says so. `check_surrogate`
    compares such a gradient with the intended one.

    Args:
        module_or_function: a module, or a function of the inputs; not compiled. A module that a
            function uses must already be float64; to have its parameters checked, pass the module
            itself.
        inputs: the positional arguments: one tensor, or a sequence. If any floating-point tensor
            among them requires a gradient, those that do are checked, otherwise all of them.
        kwargs: keyword arguments of the call, not checked.
        seed: for the random directions, the draws, and the noise that breaks ties.
        eps: the smallest step of the finite difference, and the only one with full=True.
        margin: smallest allowed distance between a token's scores; 100 * eps by default.
        full: checks every entry of every tensor; the time grows with their number.
        check_forward_ad: also compares forward mode with the backward pass. A function that raises
            because it has no forward mode is not wrong; this is noted on standard error.
        check_batched_grad: compares gradients that vmap forms for several incoming gradients at
            once with those formed one by one. If vmap cannot run the backward pass, for example
            because it writes into a new tensor in place, this is noted in the same way.
        raise_exception: raise on a wrong gradient instead of returning False.
        **options: for `torch.autograd.gradcheck`, with full=True: atol, rtol, nondet_tol,
            fast_mode, ...

    Returns:
        True if the gradients are right; False if not and raise_exception is False.

    Raises:
        GradcheckError: a gradient is wrong (torch.autograd.gradcheck.GradcheckError, a
            RuntimeError). The message names tensors, entries, tokens and experts.
        UnstableSelectionError: a tie remains, or a step changed a choice; the message names the
            token.
        TypeError: an argument has another type, or the module is sharded.
        ValueError: a number is out of range, an option is given without full=True, or there is
            nothing to check: no floating-point input and no parameter, or no output that requires a
            gradient.
    """
    check_callable("gradcheck", "module_or_function", module_or_function)
    subject = Subject("gradcheck", module_or_function, inputs, kwargs)
    check_integer("gradcheck", "seed", seed)
    check_positive("gradcheck", "eps", eps)
    if margin is not None:
        check_not_negative("gradcheck", "margin", margin)
    for name, flag in (
        ("full", full),
        ("check_forward_ad", check_forward_ad),
        ("check_batched_grad", check_batched_grad),
        ("raise_exception", raise_exception),
    ):
        check_flag("gradcheck", name, flag)
    if options and not full:
        raise ValueError(
            f"gradcheck: {next(iter(options))} must be given with full=True, as an option of "
            "torch.autograd.gradcheck, got full=False"
        )
    checked = _Checked(subject, seed, eps, _MARGIN_IN_STEPS * eps if margin is None else margin)
    checked.leave_ties()
    modes = [
        mode
        for mode, wanted in (("forward", check_forward_ad), ("batched", check_batched_grad))
        if wanted
    ]
    try:
        if full:
            checked.check_every_entry(options)
        result = checked.check_samples(of_modes_only=full, modes=modes)
        if result.disagreements:
            raise GradcheckError(explanation("gradcheck", result, _EXPECTED))
    except GradcheckError:
        if raise_exception:
            raise
        return False
    return True


class _Checked:
    """A subject at inputs away from ties, each evaluation compared with the first."""

    def __init__(self, subject: Subject, seed: int, eps: float, margin: float) -> None:
        self._subject = subject
        self._seed = seed
        self._eps = eps
        self._margin = margin
        self._originals = list(subject.arguments)
        self._attempt = 0
        self._first, self._outputs = self._observe(subject.tensors)
        self._differentiable = [n for n, y in self._outputs.items() if y.requires_grad]
        if not self._differentiable:
            raise ValueError(
                "gradcheck: module_or_function must return a floating-point tensor that requires "
                f"a gradient, got {', '.join(self._outputs) or 'none'}"
            )

    def leave_ties(self) -> None:
        """Moves the inputs until the scores of every token are a margin apart."""
        while True:
            gap, token = smallest_gap(self._first)
            if gap >= self._margin:
                return
            if self._attempt == _ATTEMPTS:
                break
            self._move()
        raise UnstableSelectionError(
            f"gradcheck: inputs must keep the scores of select_experts {self._margin:g} apart, got "
            f"{gap:g} for token {token} after {_ATTEMPTS} attempts to move the inputs away from "
            "the tie; check the module or function at other parameters"
        )

    def check_samples(self, *, of_modes_only: bool, modes: Sequence[str]) -> Derivatives:
        """The sampled check, and that of further modes."""
        result = Derivatives([], [], list(self._subject.tensors), self._differentiable, 0.0, None)
        if not of_modes_only:
            result = self._sampled()
        found = list(result.disagreements)
        for mode in modes if not found else ():
            given = _MODES[mode](
                self._subject.outputs, self._subject.tensors, self._differentiable, self._seed
            )
            if isinstance(given, str):
                ProgressLines("gradcheck").say(f"{mode} derivatives are refused, {given}")
            else:
                found += [self._placed(d) for d in given]
        return replace(result, disagreements=found)

    def _sampled(self) -> Derivatives:
        progress = ProgressLines("gradcheck")
        while True:
            result = check_derivatives(
                self._subject.outputs,
                self._subject.tensors,
                outputs=self._differentiable,
                seed=self._seed,
                smallest_step=self._eps,
                place=self._subject.place,
                progress=progress,
            )
            unstable = [u.reason for u in result.undecided if u.kind == "choice"]
            if not unstable or result.disagreements:
                silent = {f"{u.name}: {u.reason}" for u in result.undecided if u.kind != "choice"}
                for text in sorted(silent):
                    progress.say(f"a part of the check says nothing about {text}")
                return result
            if self._attempt == _ATTEMPTS or self._margin == 0 or not self._subject.floats:
                raise UnstableSelectionError(f"gradcheck: {unstable[0]}")
            self._move()

    def _placed(self, d: Disagreement) -> Disagreement:
        token, expert = self._subject.place(d.name, d.entry)
        return replace(d, token=token, expert=expert)

    def check_every_entry(self, options: Mapping[str, Any]) -> None:
        """torch.autograd.gradcheck, whose message is kept where samples do not say more."""
        names = list(self._subject.tensors)
        leaves = [t.detach().requires_grad_() for t in self._subject.tensors.values()]
        progress = ProgressLines("gradcheck")
        began = time.perf_counter()
        self._observe(self._subject.tensors)
        once = time.perf_counter() - began
        total = 2 * sum(leaf.numel() for leaf in leaves)
        done = 0

        def evaluate(*tensors: Tensor) -> tuple[Tensor, ...]:
            nonlocal done
            if not options.get("fast_mode"):
                progress(min(done, total), total, total * once)
            done += 1
            seen, outputs = self._observe(dict(zip(names, tensors, strict=True)))
            compare("gradcheck", self._first, seen)
            return tuple(outputs[name] for name in self._differentiable)

        try:
            torch.autograd.gradcheck(
                evaluate, leaves, eps=self._eps, raise_exception=True, **options
            )
        except GradcheckError as error:
            raise GradcheckError(self._shortened(error)) from None

    def _shortened(self, error: GradcheckError) -> str:
        """What samples say of what torch found, which says it in whole matrices."""
        with suppress(UnstableSelectionError):
            result = self._sampled()
            if result.disagreements:
                return explanation("gradcheck", result, _EXPECTED)
        return f"{error}\n{self._numbered(list(self._subject.tensors))}"

    def _numbered(self, names: Sequence[str]) -> str:
        numbered = ", ".join(f"{i} = {name}" for i, name in enumerate(names))
        text = f"Inputs of this check: {numbered}."
        if self._first.replaced_derivatives:
            ops = ", ".join(sorted(self._first.replaced_derivatives))
            text += (
                f" The function calls {ops}: this deliberately gives another gradient than the "
                "derivative of the forward pass, so finite differences cannot agree with it."
            )
        return text

    def _move(self) -> None:
        noise = torch.Generator().manual_seed(self._seed + self._attempt)
        distance = _FIRST_MOVE_IN_MARGINS * self._margin * 2.0**self._attempt
        for i in self._subject.floats:
            original = self._originals[i]
            drawn = torch.randn(original.shape, generator=noise, dtype=torch.float64)
            self._subject.arguments[i] = original + distance * drawn.to(original.device)
        self._attempt += 1
        self._first, self._outputs = self._observe(self._subject.tensors)

    def _observe(self, tensors: Mapping[str, Tensor]) -> tuple[Observation, dict[str, Tensor]]:
        """The choices and outputs, with a graph from `tensors` or from leaves like them."""
        leaves = {
            n: t if t.requires_grad else t.detach().requires_grad_() for n, t in tensors.items()
        }
        with same_draws(self._seed, list(tensors.values())), Observer() as observer:
            outputs = self._subject.outputs(leaves)
        return observer.seen, outputs
