"""Gradients that add up."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchmoe.testing.certify.copies import added
from torchmoe.testing.certify.law import Answer, Difference, Gap, Law, Note, differences
from torchmoe.testing.certify.subject import Subject

_MICRO_BATCHES = 3
# With fewer tokens a law is asked for the smallest input that fails.
_LARGE = 9
# Rows of an expert in a large batch, so that a kernel's blocks are filled and have a rest, in how
# many parts, and how many tokens at most.
_ROWS, _PARTS, _MOST = 67, 8, 4096


def ask(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """Scales, then sums of backward passes, then micro-batches, small before large ones."""
    wrong = False
    for answer in _small(subject, num_tokens):
        wrong = wrong or isinstance(answer, Difference)
        yield answer
    if subject.sharing is None and num_tokens >= _LARGE and not wrong:
        yield from _large_batch(subject)


def _small(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    if subject.surrogate is None:
        yield from _scales(subject, num_tokens)
    yield from _sums(subject, num_tokens)
    if subject.sharing is not None:
        yield Gap("micro-batches", subject.sharing.why)
    else:
        yield from _micro_batches(subject, num_tokens)


def _scales(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """grad(s L) = s grad(L), for the task's loss, the auxiliary loss and both."""
    x = subject.tokens(num_tokens)
    for main, aux in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        if aux and not subject.has_loss:
            continue
        whole = subject.step(subject.fresh(), x, main=main, aux=aux).gradients
        for scale in (1024.0, -0.25):
            got = subject.step(subject.fresh(), x, main=scale * main, aux=scale * aux).gradients
            yield from differences(
                f"linear in the loss scale, times {scale:g}",
                _named(added([whole], scale)),
                _named(got),
                subject.tolerance,
                "A gradient is added that does not come from the loss, or a constant scale is kept "
                "apart from it.",
            )


def _sums(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """Two backward passes without zero_grad between them add their gradients."""
    layer = subject.fresh()
    steps = []
    for stream in (0, 1):
        steps.append(subject.step(subject.fresh(), subject.tokens(num_tokens, stream)).gradients)
    layer.zero_grad(set_to_none=True)
    for stream in (0, 1):
        subject.back(subject.call(layer, subject.tokens(num_tokens, stream)))
    got = {
        name: parameter.grad
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad
    }
    expected = {name: grad for name, grad in added(steps).items() if name != "x"}
    yield from differences(
        "two steps without zero_grad add up",
        _named(expected),
        _named(got),
        subject.tolerance,
        "A backward pass writes .grad instead of adding to it, or keeps something of the last one.",
    )


def _micro_batches(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """The gradients of m parts of a batch add up to those of the batch."""
    x = subject.tokens(num_tokens)
    g = subject.incoming(x)
    whole, loss = _of_the_task(subject, x, g)
    parts, losses = [], []
    for rows, arriving in subject.parts(x, g, _MICRO_BATCHES):
        part, own = _of_the_task(subject, rows, arriving)
        parts.append(part)
        losses.append((rows.shape[-2], own))
    yield from differences(
        "micro-batches add up to the batch",
        _named(whole),
        _named(added(parts)),
        subject.tolerance,
        "Something is divided by the number of tokens of the call, or crosses tokens.",
    )
    if loss is not None and num_tokens > _MICRO_BATCHES:
        mean = sum(n * own for n, own in losses if own is not None) / num_tokens
        same = bool((mean - loss).abs() <= subject.tolerance * loss.abs())
        yield Note(
            "aux_loss of a batch is the mean of its micro-batches'"
            if same
            else "aux_loss is formed from each call's own counts: that of a batch is not the mean "
            "of its micro-batches'"
        )


def _large_batch(subject: Subject) -> Iterator[Answer]:
    """y, dL/dx and dL/dtheta of a batch that fills several blocks are those of its parts."""
    number = min(_ROWS * (subject.num_experts or 1) // (subject.top_k or 1), _MOST)
    x = subject.tokens(number)
    g = subject.incoming(x)
    whole = subject.step(subject.steady(), x, incoming=g, aux=0.0)
    parts = [
        subject.step(subject.steady(), rows, incoming=arriving, aux=0.0)
        for rows, arriving in subject.parts(x, g, _PARTS)
    ]
    expected: dict[str, Tensor | None] = {}
    got: dict[str, Tensor | None] = {}
    if not subject.may_attach:
        of_x = [grad for part in parts if (grad := part.gradients.pop("x")) is not None]
        sums = added([part.gradients for part in parts])
        expected = _named({"x": torch.cat(of_x, dim=-2) if of_x else None, **sums})
        got = _named(whole.gradients)
    expected["y"] = torch.cat([part.reading.hidden_states for part in parts], dim=-2)
    got["y"] = whole.reading.hidden_states
    yield from differences(
        "a large batch is its parts",
        expected,
        got,
        subject.tolerance,
        "A kernel leaves out, or takes twice, the rows at the end of an expert's block.",
        number,
    )


def _of_the_task(
    subject: Subject, x: Tensor, g: Tensor
) -> tuple[dict[str, Tensor | None], Tensor | None]:
    """The gradients of <g, y> for the parameters, and the auxiliary loss."""
    step = subject.step(subject.steady(), x, incoming=g, aux=0.0)
    gradients = {name: grad for name, grad in step.gradients.items() if name != "x"}
    if subject.surrogate is not None:
        # A loss that is attached to y comes with any gradient of y, one of zeros too.
        attached = subject.step(subject.steady(), x, incoming=torch.zeros_like(g), aux=0.0)
        for name, grad in gradients.items():
            other = attached.gradients[name]
            gradients[name] = grad if grad is None or other is None else grad - other
    loss = step.reading.aux_loss
    return gradients, None if loss is None else loss.detach()


def _named(gradients: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {f"d/d {name}": grad for name, grad in gradients.items()}


LAW = Law(
    name="accumulation",
    formula="grad(sum of L_m) = sum of grad(L_m); grad(s L) = s grad(L), auxiliary losses too",
    means="A gradient depends on how the batch was cut or on how the loss was scaled.",
    ask=ask,
)
