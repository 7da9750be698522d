"""A failed check on one screen: what is wrong where, and what that usually means."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torchmoe.testing._derivatives import Derivatives, Disagreement

_ROWS_OF_A_TENSOR, _ROWS = 2, 10
_COLUMNS = ("tensor", "entry", "expected", "got", "bound", "of output", "incoming", "token, expert")

# How far apart ratios are that count as one number.
_SAME_RATIO = 1e-2


def explanation(owner: str, result: Derivatives, expected: str) -> str:
    """The message of a failed check, at most some twenty lines.

    Args:
        owner: starts the message.
        result: with disagreements.
        expected: what the gradient must be, in words.
    """
    found = result.disagreements
    wrong = list(dict.fromkeys(d.name for d in found))
    right = [name for name in result.names if name not in wrong]
    first = found[0]
    lines = [
        f"{owner}: the gradient of {_listed(wrong)} must be {expected}, got {first.got:.6g} "
        f"where {first.expected:.6g} is expected",
        "",
        *_table(_chosen(found), result),
        "",
        f"Found nothing wrong with {_listed(right)}." if right else "No tensor is right.",
        f"What this usually means: {_meaning(found, result)}",
    ]
    return "\n".join(lines)


def _chosen(found: Sequence[Disagreement]) -> list[Disagreement]:
    rows: list[Disagreement] = []
    for d in found:
        if sum(row.name == d.name for row in rows) < _ROWS_OF_A_TENSOR and len(rows) < _ROWS:
            rows.append(d)
    return rows


def _table(rows: Sequence[Disagreement], result: Derivatives) -> list[str]:
    cells = [_COLUMNS, *(_cells(d, result) for d in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(_COLUMNS))]
    return [
        "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _cells(d: Disagreement, result: Derivatives) -> tuple[str, ...]:
    return (
        d.name,
        f"[{', '.join(map(str, d.entry))}]" if d.entry else "a direction",
        f"{d.expected:.6g}",
        f"{d.got:.6g}",
        f"{d.bound:.1e}",
        d.output,
        d.layout if d.mode == "reverse" else d.mode,
        _place(d, result),
    )


def _place(d: Disagreement, result: Derivatives) -> str:
    """The token with the experts that it chose, or the expert with the tokens that chose it."""
    routing = result.routing
    if d.token is not None:
        known = routing is not None and d.token < routing.shape[0]
        experts = routing[d.token].tolist() if routing is not None and known else []
        return f"token {d.token}" + (f", experts {experts}" if experts else "")
    if d.expert is None:
        return "-"
    if routing is None:
        return f"expert {d.expert}"
    tokens = (routing == d.expert).any(dim=-1).nonzero().flatten().tolist()
    more = ", ..." if len(tokens) > 3 else ""
    shown = ", ".join(map(str, tokens[:3])) + more
    return f"expert {d.expert}, " + (f"tokens {shown}" if tokens else "no token")


def _meaning(found: Sequence[Disagreement], result: Derivatives) -> str:
    modes = {d.mode for d in found}
    if "reverse" not in modes:
        return (
            f"the backward pass is right, but {' and '.join(sorted(modes))} derivatives are not: "
            "a rule of their own is wrong, or missing without an error."
        )
    if any(math.isnan(d.got) or math.isinf(d.got) for d in found):
        return (
            "the backward pass divides by 0 or multiplies 0 by infinity, often for a slot that is "
            "dropped or masked; torch.where around the result hides this forward, not backward."
        )
    if result.replaced:
        ops = ", ".join(sorted(result.replaced))
        return (
            f"the function calls {ops}: this deliberately gives another gradient than the "
            "derivative of the forward pass. Check the function without it, or compare the "
            "replaced gradient with what it is meant to be: check_surrogate."
        )
    layouts = {d.layout for d in found}
    if "contiguous" not in layouts:
        return (
            f"only gradients that arrive {' or '.join(sorted(layouts))} are wrong: the backward "
            "pass reads the memory of the incoming gradient as if it were contiguous."
        )
    return _of_values(found)


def _of_values(found: Sequence[Disagreement]) -> str:
    for name in dict.fromkeys(d.name for d in found):
        meaning = _of_one_tensor([d for d in found if d.name == name])
        if meaning:
            return meaning
    return (
        "a formula of the backward pass is not the derivative of the forward pass, or a path from "
        "the tensor to the output is missing, such as the one through the weights or their "
        "normalisation."
    )


def _of_one_tensor(rows: Sequence[Disagreement]) -> str:
    """What the numbers of one tensor have in common; nothing where that is nothing."""
    part = _common_part(rows)
    if all(d.got == 0 for d in rows):
        return (
            f"no gradient arrives at {part}: detach(), torch.no_grad(), .item(), a new tensor "
            "made of values, or a backward pass that returns None or 0 for this argument."
        )
    if all(d.expected == 0 for d in rows):
        return f"a gradient flows to {part}, on which the output does not depend."
    ratios = [d.got / d.expected for d in rows if d.expected]
    if len(rows) > 1 and max(ratios) - min(ratios) <= _SAME_RATIO * abs(ratios[0]):
        if abs(ratios[0] + 1) <= _SAME_RATIO:
            return f"a sign is turned: got is -1 times expected all over {part}."
        return (
            f"a factor is lost or applied twice: got is {ratios[0]:.4g} times expected all over "
            f"{part}, as by a mean for a sum, a count of slots, experts or processes, or a term "
            "that is added once too often."
        )
    if part != rows[0].name:
        return f"numbers of {part} are mixed up with others', left out or overwritten."
    return ""


def _common_part(rows: Sequence[Disagreement]) -> str:
    """The tensor, or the part of it that three disagreements lie in."""
    name, common = rows[0].name, list(rows[0].entry)
    for d in rows[1:]:
        agreeing = [a == b for a, b in zip(common, d.entry, strict=False)]
        common = common[: agreeing.index(False) if False in agreeing else len(agreeing)]
    return f"{name}[{', '.join(map(str, common))}]" if len(rows) > 2 and common else name


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")
