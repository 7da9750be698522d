"""What gets no token, no gradient or no rest, and types narrower than float64."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from torchmoe.testing.certify.copies import buffers
from torchmoe.testing.certify.graphs import graphs_alive
from torchmoe.testing.certify.law import Answer, Difference, Law, differences
from torchmoe.testing.certify.narrow_types import narrow_types
from torchmoe.testing.certify.subject import Subject

# An expert's place in a list, or its name in a dict.
_NUMBERED = re.compile(r"^(experts?_?)?\d+$")
_LEFT = "Something of an earlier pass is kept outside of the state_dict and read again."


def ask(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """Gradients of idle experts, dead parameters, evaluation, narrow types, autocast."""
    yield from _idle(subject, num_tokens)
    yield from _never(subject, num_tokens)
    yield from _evaluation(subject, num_tokens)
    yield from _remembers_nothing(subject, num_tokens)
    yield from narrow_types(subject, num_tokens)


def _idle(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """An expert without tokens: dL/dtheta = 0, a tensor."""
    x = subject.tokens(min(num_tokens, 1))
    step = subject.step(subject.fresh(), x)
    for name in subject.names("experts"):
        if step.gradients[name] is None and not subject.left_out(name):
            yield Difference(
                "an idle expert's gradient is 0, not None",
                f"d/d {name}",
                "zeros",
                "None",
                "A loop leaves out experts without tokens: DistributedDataParallel waits for their "
                "gradients, and optimizers treat them unlike zeros. Multiply by an empty batch, or "
                "say so with Adapter(without_gradient=...).",
            )
            return


def _never(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """Every parameter gets a gradient other than 0 from one of many tokens."""
    learned: dict[str, float] = {}
    for stream in range(4):
        step = subject.step(subject.fresh(), subject.tokens(max(4 * num_tokens, 32), stream))
        for name, grad in step.gradients.items():
            size = 0.0 if grad is None else grad.abs().max().item()
            learned[name] = max(learned.get(name, 0.0), size)
    used = {_kind(name) for name, size in learned.items() if size > 0}
    for name, size in learned.items():
        if name != "x" and size == 0 and not subject.left_out(name) and _kind(name) not in used:
            yield Difference(
                "every parameter learns",
                f"d/d {name}",
                "a gradient other than 0 for some of 128 tokens",
                "0 or None for all of them",
                "The parameter is detached, unused, or should be a buffer.",
            )


def _kind(name: str) -> str:
    """The name without the number of the expert, which may be idle throughout."""
    return ".".join(_NUMBERED.sub("#", part) for part in name.split("."))


def _evaluation(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """In evaluation nothing is drawn and no buffer moves."""
    layer, x = subject.fresh(training=False), subject.tokens(num_tokens)
    before = buffers(layer)
    with torch.no_grad():
        one = subject.call(layer, x).hidden_states
        two = subject.call(layer, x, draw=1).hidden_states
    yield from differences(
        "nothing is drawn in evaluation",
        {"y": one},
        {"y": two},
        0.0,
        "Noise or jitter is added whether or not the layer trains.",
    )
    yield from differences(
        "buffers rest in evaluation",
        {f"buffer {name}": value for name, value in before.items()},
        {f"buffer {name}": value for name, value in buffers(layer).items()},
        0.0,
        "Counts or averages move in evaluation too.",
    )


def _remembers_nothing(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """A step gives what it gives on a fresh copy, whatever was called before it."""
    other = subject.tokens(num_tokens + 2, stream=1)
    # One token, too, for which experts are idle that were not.
    for x in (subject.tokens(num_tokens), subject.tokens(1)):
        fresh = subject.step(subject.fresh(), x)
        used = subject.fresh()
        state = {name: value.clone() for name, value in used.state_dict().items()}
        subject.step(used, other)
        with torch.no_grad():
            for earlier in (other, subject.tokens(x.shape[-2], stream=1)):
                subject.call(used.eval(), earlier)
            used.load_state_dict(state)
            got = {"y": subject.call(used, x).hidden_states}
            expected = {"y": subject.call(subject.fresh(training=False), x).hidden_states}
        clause = "a pass leaves nothing behind for the next one"
        at_rest = f"{clause} in evaluation"
        yield from differences(at_rest, expected, got, subject.tolerance, _LEFT)
        used.train()
        used.load_state_dict(state)
        yield from differences(
            clause,
            fresh.everything,
            subject.step(used, x).everything,
            subject.tolerance,
            _LEFT,
        )
    kept = graphs_alive(subject, subject.fresh(), [subject.tokens(num_tokens, s) for s in range(4)])
    if kept > 1:
        yield Difference(
            "a graph dies with its pass",
            "graphs alive after 4 passes",
            "at most the last one",
            str(kept),
            "Losses or logits are appended to a list that nobody empties.",
        )


LAW = Law(
    name="idle_experts",
    formula="no token: gradient 0; every parameter learns; evaluation draws and moves nothing; "
    "|y_bf16 - y| <= c eps |y|",
    means="Something that should be at rest moves, or something that should move rests.",
    ask=ask,
    smallest=4,
)
