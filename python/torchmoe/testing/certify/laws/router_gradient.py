"""What the router learns from."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from torchmoe.testing.certify.law import ALL_OF_IT, Answer, Difference, Gap, Law, differences
from torchmoe.testing.certify.subject import Subject

_HUGE = 2000.0
# Tokens enough for some to have scores that lie close: a threshold of 1 % would be met by several.
_MANY = 512
_MUST = "a gradient other than 0"


def ask(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """From y alone, so that a balancing loss hides nothing; then as the surrogate says."""
    names = subject.names("router")
    if not names:
        yield Gap(
            ALL_OF_IT,
            "no parameter of a router is seen; Adapter(router=...) tells where",
            could_be_asked=not subject.is_mixture,
        )
        return
    yield from _learns(subject, num_tokens, names)
    yield from _finite(subject, num_tokens)
    if subject.surrogate is not None:
        yield from _as_declared(subject, num_tokens)


def _learns(subject: Subject, num_tokens: int, names: list[str]) -> Iterator[Answer]:
    """The sum over t of <dL/dw_t, dw_t/dtheta> is not 0 for the router's parameters theta."""
    found = list(_silent(subject, num_tokens, names))
    if found:
        # Where an estimator leaves out the scores far below the best, a weight is 1 whatever the
        # scores, and its gradient truly 0, for every token but those with scores that lie close.
        always = {answer.where for answer in _silent(subject, _MANY, names)}
        yield from (answer for answer in found if answer.where in always)


def _silent(subject: Subject, num_tokens: int, names: list[str]) -> Iterator[Difference]:
    """Parameters of the router, or its rows of experts in use, that y gives no gradient."""
    layer, x = subject.fresh(), subject.tokens(num_tokens)
    step = subject.step(layer, x, aux=0.0)
    largest = max(
        (g.abs().max().item() for g in step.gradients.values() if g is not None), default=0.0
    )
    dead = [
        name
        for name in names
        if not subject.left_out(name)
        and ((grad := step.gradients[name]) is None or grad.abs().max() <= 1e-9 * largest)
    ]
    if len(dead) == len(names):
        for name in dead:
            got = "None" if step.gradients[name] is None else "0"
            yield Difference("learns from the task loss", f"d/d {name}", _MUST, got)
        return
    indices, weight = step.reading.indices, subject.adapter.router_weight(layer)
    if indices is None or weight is None or (subject.top_k or 1) < 2 or subject.surrogate:
        return
    grad = step.gradients.get(weight)
    if grad is None or grad.shape[0] != subject.num_experts:
        return
    for expert in sorted({i for i in indices.flatten().tolist() if 0 <= i < len(grad)}):
        if grad[expert].abs().max() <= 1e-9 * largest:
            where = f"d/d {weight}[{expert}]"
            yield Difference("learns from every expert in use", where, _MUST, "0")


def _finite(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """Weights and gradients are finite where every score of a token underflows, and far above."""
    weight = subject.adapter.router_weight(subject.fresh())
    if weight is None:
        return
    common = subject.tokens(1, stream=9).flatten()
    x = subject.tokens(num_tokens) * 0.1 + common
    for logit in (-_HUGE, _HUGE):
        layer = subject.fresh()
        with torch.no_grad():
            matrix = dict(layer.named_parameters())[weight]
            if matrix.shape[-1] != len(common):
                return
            spread = torch.linspace(0.8, 1.2, len(matrix), dtype=matrix.dtype)
            matrix.copy_(logit * torch.outer(spread, common / common.square().sum()))
        for name, value in subject.step(layer, x).everything.items():
            if value is not None and not bool(value.isfinite().all()):
                yield Difference(
                    f"finite with logits around {logit:g}",
                    name,
                    "finite numbers",
                    str(value[~value.isfinite()].flatten()[0].item()),
                    "Weights are divided by the sum of scores that have all underflowed.",
                )


def _as_declared(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """The layer's gradient is the surrogate's, for incoming gradients of any size."""
    x = subject.tokens(num_tokens)
    for main in (1.0, 1024.0):
        expected = subject.declared(subject.fresh(), x, main).gradients
        got = subject.step(subject.fresh(), x, main=main).gradients
        clause = "straight-through as declared"
        yield from differences(
            clause,
            {f"d/d {name}": grad for name, grad in expected.items()},
            {f"d/d {name}": grad for name, grad in got.items()},
            subject.tolerance,
            "The layer's backward pass and its surrogate(x) say different things.",
        )


LAW = Law(
    name="router_gradient",
    formula="dL/dlogits = sum over slots of <dL/dy, E_i(x)> dw/dlogits, and not 0 from y alone",
    means=(
        "The weights are detached, or do not depend on the scores, as a single expert's normalised "
        "weight, which is always 1: the router learns from the balancing loss alone, or not at all."
    ),
    ask=ask,
)
