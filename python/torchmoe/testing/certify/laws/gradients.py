"""Every gradient against finite differences, however it is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchmoe.testing.certify.copies import added, gradients
from torchmoe.testing.certify.finite_differences import against_differences
from torchmoe.testing.certify.law import Answer, Difference, Gap, Law, Note, differences
from torchmoe.testing.certify.subject import Subject

_STRIDES = "A kernel reads memory as if it were contiguous, or writes where it should read."
_NEEDS = "What is saved or skipped depends on which gradients are wanted, and something is missing."


def ask(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """Differences, also with one token; strides; what is wanted; two passes."""
    if subject.surrogate is None:
        yield from _differences(subject, num_tokens)
        if subject.replaced:
            yield Note(
                f"{', '.join(sorted(subject.replaced))} in the layer replaces the derivative on "
                "purpose: a method surrogate(x) of the layer says by what"
            )
    else:
        why = "the layer declares a surrogate, with which router_gradient compares it"
        yield Gap("finite differences", why)
    yield from _strides(subject, num_tokens)
    yield from _what_is_wanted(subject, num_tokens)
    yield from _two_passes(subject, num_tokens)


def _differences(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """<G, f(theta + h v) - f(theta - h v)> / 2 h -> <grad, v>, until one is wrong."""
    for training, number in ((True, num_tokens), (True, 1), (False, num_tokens)):
        layer = subject.fresh(training=training)
        wrong = False
        for answer in against_differences(
            "finite differences" if training else "finite differences in evaluation",
            subject.function(layer),
            lambda stream, number=number: subject.point(  # type: ignore[misc]
                subject.fresh(), subject.tokens(number, stream)
            ),
            subject.outputs(training=training),
            subject.role,
            subject.seed,
        ):
            wrong = wrong or isinstance(answer, Difference)
            yield answer
        if wrong:
            return


def _strides(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """The strides of x and of dL/dy change nothing; neither is written to."""
    x = subject.tokens(num_tokens)
    plain = subject.step(subject.fresh(), x)
    g = subject.incoming(plain.reading.hidden_states)
    turned = g.transpose(-1, -2).contiguous().transpose(-1, -2)
    got = subject.step(subject.fresh(), x, incoming=turned)
    yield from differences(
        "a transposed incoming gradient",
        plain.everything,
        got.everything,
        subject.tolerance,
        _STRIDES,
    )
    ones = torch.ones_like(g)
    expected = subject.step(subject.fresh(), x, incoming=ones)
    got = subject.step(subject.fresh(), x, incoming=ones.new_ones(()).expand(g.shape))
    yield from differences(
        "an expanded incoming gradient",
        expected.everything,
        got.everything,
        subject.tolerance,
        _STRIDES,
    )
    # Draws in the layout of x are laid out as x is: in the mode that draws nothing.
    strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    expected = subject.step(subject.steady(), x)
    got = subject.step(subject.steady(), strided)
    yield from differences(
        "a transposed x", expected.everything, got.everything, subject.tolerance, _STRIDES
    )
    kept, arriving = x.clone(), g.clone()
    subject.step(subject.fresh(), kept, incoming=arriving)
    written = "An op in place changes what others still read."
    yield from differences("x is not written to", {"x": x}, {"x": kept}, 0.0, written)
    yield from differences(
        "dL/dy is not written to", {"dL/dy": g}, {"dL/dy": arriving}, 0.0, written
    )


def _what_is_wanted(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """A gradient is the same whichever others are wanted."""
    x = subject.tokens(num_tokens)
    plain = subject.step(subject.fresh(), x)
    layer = subject.fresh()
    subject.back(subject.call(layer, x))
    expected = {f"d/d {name}": grad for name, grad in plain.gradients.items() if name != "x"}
    got: dict[str, Tensor | None] = {f"d/d {name}": g for name, g in gradients(layer).items()}
    clause = "an input without gradient"
    yield from differences(clause, expected, got, subject.tolerance, _NEEDS)
    roles = sorted({subject.role(name) for name, _ in layer.named_parameters()})
    for role in roles if len(roles) > 1 else []:
        layer = subject.fresh()
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and subject.role(name) == role)
        subject.back(subject.call(layer, x))
        got = {f"d/d {name}": grad for name, grad in gradients(layer).items()}
        alone = {name: expected[name] for name in got}
        clause = f"all but the {role} frozen"
        yield from differences(clause, alone, got, subject.tolerance, _NEEDS)


def _two_passes(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """Two forward passes before one backward pass; one forward pass before two."""
    layer = subject.fresh()
    xs = [subject.tokens(num_tokens, stream).requires_grad_() for stream in (0, 1)]
    readings = [subject.call(layer, x) for x in xs]
    for reading in readings:
        subject.back(reading)
    alone = [subject.step(subject.fresh(), x) for x in xs]
    expected = {
        f"d/d {name}": grad
        for name, grad in added([s.gradients for s in alone]).items()
        if name != "x"
    }
    got: dict[str, Tensor | None] = {f"d/d {name}": g for name, g in gradients(layer).items()}
    for number, (x, step) in enumerate(zip(xs, alone, strict=True)):
        expected[f"d/d x of pass {number + 1}"] = step.gradients["x"]
        got[f"d/d x of pass {number + 1}"] = x.grad
    yield from differences(
        "two forward passes before a backward pass",
        expected,
        got,
        subject.tolerance,
        "What a backward pass needs is kept on the layer or its class, where the next pass writes.",
    )
    layer, x = subject.fresh(), subject.tokens(num_tokens).requires_grad_()
    y = subject.call(layer, x).hidden_states
    if not y.requires_grad:
        return
    g = subject.incoming(y)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    try:
        once, twice = (
            torch.autograd.grad(y, inputs, g, retain_graph=True, allow_unused=True)
            for _ in range(2)
        )
    except RuntimeError as error:
        got_error = str(error).splitlines()[0]
        clause = "a second backward pass"
        yield Difference(clause, "y", "the same gradients again", got_error, _STRIDES)
        return
    names = ["x", *(name for name, p in layer.named_parameters() if p.requires_grad)]
    yield from differences(
        "a second backward pass",
        {f"d/d {name}": grad for name, grad in zip(names, once, strict=True)},
        {f"d/d {name}": grad for name, grad in zip(names, twice, strict=True)},
        subject.tolerance,
        "A backward pass changes what it has saved.",
    )


LAW = Law(
    name="gradients",
    formula="<grad L, v> = d/dh L(theta + h v) at h = 0, for the router, experts, x and all else",
    means=(
        "A derivative written by hand is wrong: a factor, a term, a slot or an expert is left out, "
        "or a detach cuts a path."
    ),
    ask=ask,
)
