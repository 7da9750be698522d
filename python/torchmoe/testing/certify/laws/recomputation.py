"""The layer under activation checkpointing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchmoe.adapter import Reading
from torchmoe.testing._observation import Observer
from torchmoe.testing.certify.copies import buffers
from torchmoe.testing.certify.law import Answer, Difference, Law, differences
from torchmoe.testing.certify.subject import Subject

_KINDS = {False: "checkpoint without reentrant autograd", True: "reentrant checkpoint"}


def ask(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """Both kinds of torch's checkpoint around the whole layer, in training."""
    x = subject.tokens(num_tokens)
    plain = subject.fresh()
    step = subject.step(plain, x)
    counted = {f"buffer {name}": value for name, value in buffers(plain).items()}
    with torch.no_grad():
        is_record = not isinstance(subject.fresh()(x), Tensor | tuple | list)
    for reentrant, clause in _KINDS.items():
        layer = subject.fresh()

        def run(module: nn.Module, leaf: Tensor, reentrant: bool = reentrant) -> Reading:
            # torch's reentrant checkpoint sees no tensor inside another record than a tuple.
            if is_record:
                return Reading(
                    *checkpoint(
                        lambda x: subject.adapter.read(module, module(x)),
                        leaf,
                        use_reentrant=reentrant,
                    )
                )
            result = checkpoint(module, leaf, use_reentrant=reentrant)
            return subject.adapter.read(module, result)

        observer = Observer()
        with observer:
            got = subject.step(layer, x, call=run)
        yield from differences(
            f"{clause}: value and gradients",
            step.everything,
            got.everything,
            subject.tolerance,
            "A draw is repeated with other numbers, a loss is kept as an attribute and loses its "
            "graph, or a forward pass changes what the next one reads.",
        )
        again = {f"buffer {name}": value for name, value in buffers(layer).items()}
        yield from differences(
            f"{clause}: counts once",
            counted,
            again,
            subject.tolerance,
            "A forward pass counts in a buffer, and recomputation is a second forward pass.",
        )
        yield from _same_routing(clause, observer)


def _same_routing(clause: str, observer: Observer) -> Iterator[Answer]:
    """The choices of the first half, the forward pass, are those of the recomputation."""
    seen = observer.seen.decisions
    half = len(seen) // 2
    if len(seen) % 2 or [op for op, _ in seen[:half]] != [op for op, _ in seen[half:]]:
        return
    for (op, before), (_, after) in zip(seen[:half], seen[half:], strict=True):
        if not torch.equal(before, after):
            apart = (
                f"{int((before != after).sum())} of them differ"
                if before.shape == after.shape
                else "another number of them"
            )
            yield Difference(f"{clause}: same routing", f"choices of {op}", "the same", apart)


LAW = Law(
    name="recomputation",
    formula="checkpoint(layer): the same y, aux_loss, gradients, choices and counts as layer",
    means="A second forward pass inside the backward pass is not the first one again.",
    ask=ask,
    smallest=4,
)
