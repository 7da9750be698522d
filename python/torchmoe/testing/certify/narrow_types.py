"""A layer in bfloat16 and under autocast, compared with itself in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchmoe.testing.certify.copies import buffers
from torchmoe.testing.certify.law import Answer, Difference, Note, differences
from torchmoe.testing.certify.looking import Look
from torchmoe.testing.certify.shared_state import same_content
from torchmoe.testing.certify.subject import ROUNDINGS_16, Step, Subject


def narrow_types(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """|y16 - y64| <= c eps (|y| + ...), at equal choices; x's type comes back; autocast as well."""
    yield from _remembered(subject, num_tokens)
    layer16 = subject.fresh(training=not subject.draws, dtype=torch.bfloat16)
    x16 = subject.tokens(num_tokens).to(torch.bfloat16)
    layer64 = subject.fresh(training=not subject.draws)
    with torch.no_grad():
        rounded = dict(layer16.named_parameters())
        for name, parameter in layer64.named_parameters():
            parameter.copy_(rounded[name])
    wide = subject.step(layer64, x16.to(subject.dtype))
    look = Look(num_tokens, subject.top_k or 1, subject.num_experts or 0)
    try:
        with look:
            narrow = subject.step(layer16, x16)
    except RuntimeError as error:
        yield Note(f"bfloat16 is refused: {str(error).splitlines()[0]}")
        return
    for name, value in {"y": narrow.reading.hidden_states, "d/d x": narrow.gradients["x"]}.items():
        if value is not None and value.dtype != torch.bfloat16:
            kind = str(value.dtype).removeprefix("torch.")
            yield Difference(
                "keeps the type of x", name, "bfloat16", kind, "A cast back is missing."
            )
    if look.ranks_rounded is not None:
        yield Difference(
            "scores are ranked before they are rounded",
            f"input of {look.ranks_rounded.split('::')[1]}",
            "scores in the type in which they were formed",
            "scores cast to bfloat16",
            "Scores that differ tie once they are rounded, and another expert is chosen.",
        )
    if look.narrow_scores is not None:
        op = look.narrow_scores.split("::")[1].strip("_")
        yield Note(f"the {op} of a bfloat16 layer's logits is formed in bfloat16, not in float32")
    yield from _within("bfloat16 within rounding of float64", subject, wide, narrow)

    layer32, x32 = subject.fresh(training=not subject.draws, dtype=torch.float32), x16.float()
    with torch.no_grad():
        for name, parameter in layer32.named_parameters():
            parameter.copy_(rounded[name])
    try:
        with torch.autocast("cpu", torch.bfloat16):
            cast = subject.step(layer32, x32)
    except RuntimeError as error:
        yield Note(f"autocast is refused: {str(error).splitlines()[0]}")
        return
    yield from _within("autocast within rounding of float64", subject, wide, cast)


def _within(clause: str, subject: Subject, wide: Step, narrow: Step) -> Iterator[Answer]:
    """By token, for those that chose the same experts; the rest are near ties."""
    bound = ROUNDINGS_16 * torch.finfo(torch.bfloat16).eps
    same = _same_choice(wide, narrow)
    for name in ("y", "d/d x"):
        one, two = wide.everything[name], narrow.everything[name]
        if one is None or two is None or one.shape != two.shape:
            continue
        rows = [value.detach().double().flatten(0, -2) for value in (one, two)]
        if same is not None and len(same) == len(rows[0]):
            rows = [row[same] for row in rows]
        elif subject.top_k is not None and name == "d/d x":
            continue
        # A quarter may have chosen otherwise where the choices are not seen.
        apart = (rows[0] - rows[1]).abs().amax(-1) / rows[0].abs().amax().clamp(min=1e-30)
        tokens = int((~(apart <= bound)).sum())
        allowed = 0 if same is not None else len(apart) // 4
        if tokens > allowed:
            yield Difference(
                clause,
                name,
                f"within {bound:.2g} of the largest entry",
                f"{apart.nan_to_num(nan=torch.inf).max().item():.2g}",
                "Sums, scores or weights are formed in the narrow type.",
            )
    loss, narrow_loss = wide.reading.aux_loss, narrow.reading.aux_loss
    if loss is not None and narrow_loss is not None and (same is None or bool(same.all())):
        values = {"aux_loss": loss}, {"aux_loss": narrow_loss}
        yield from differences(clause, *values, bound, "The loss is formed in the narrow type.")


def _same_choice(wide: Step, narrow: Step) -> Tensor | None:
    one, two = wide.reading.indices, narrow.reading.indices
    if one is None or two is None or one.shape != two.shape:
        return None
    return (one.sort(-1).values == two.sort(-1).values).all(-1)


def _remembered(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """Buffers that a step moves are float32 or wider in a bfloat16 layer, too."""
    wide, narrow = subject.fresh(), subject.fresh(dtype=torch.bfloat16)
    states = [buffers(wide)]
    with torch.no_grad():
        subject.call(wide, subject.tokens(num_tokens))
        states.append(buffers(wide))
        subject.update(wide)  # which may set back what a pass has counted
        states.append(buffers(wide))
    for name, buffer in narrow.named_buffers():
        first, second, third = (state[name] for state in states)
        moved = not same_content(first, second) or not same_content(second, third)
        dtype = buffer.dtype
        if moved and dtype in (torch.bfloat16, torch.float16):
            yield Difference(
                "what is remembered stays wide",
                f"buffer {name}",
                "float32 or wider, or integers",
                str(dtype).removeprefix("torch."),
                "Counts above 256 and steps below a hundredth are lost in 16 bits: the layer's "
                "dtype has taken the buffer along.",
            )
