"""What a law is, and what asking one gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchmoe.testing.certify.subject import Subject


@dataclass(frozen=True)
class Difference:
    """A place where a law does not hold."""

    clause: str
    where: str
    expected: str
    got: str
    meaning: str | None = None
    """What it usually means, where that is more than what the law says of itself."""
    num_tokens: int | None = None
    """With how many tokens, where that is another number than the law was asked with."""


@dataclass(frozen=True)
class Gap:
    """A clause that was not asked."""

    clause: str
    why: str
    could_be_asked: bool = False


@dataclass(frozen=True)
class Note:
    """Something to know that breaks no law."""

    text: str


Answer = Difference | Gap | Note


@dataclass(frozen=True)
class Law:
    """One law.

    Attributes:
        name: by which `certify(laws=...)` and a finding name it.
        formula: what must hold, on one line.
        means: what a failure usually means, one sentence.
        ask: (subject, num_tokens) -> what was found with that many tokens. Asked with
            `NUM_TOKENS` first, and with 1, 2, 3 and so on for the smallest input that fails.
        on_request: whether "all" leaves it out.
        smallest: the most tokens with which the smallest input is looked for.
    """

    name: str
    formula: str
    means: str
    ask: Callable[[Subject, int], Iterator[Answer]]
    on_request: bool = False
    smallest: int = 8


ALL_OF_IT = "all of it"
_FLOOR = 0.01


def differences(
    clause: str,
    expected: Mapping[str, Tensor | None],
    got: Mapping[str, Tensor | None],
    tolerance: float,
    meaning: str | None = None,
    num_tokens: int | None = None,
) -> Iterator[Difference]:
    """A difference for every tensor further from its expected value than rounding explains.

    |got - expected| <= tolerance max(|expected|, |got|, floor), each maximum over the tensor; the
    floor is a hundredth of the largest element among all tensors, whose terms may cancel elsewhere.
    None counts as zeros.
    """
    sizes = [t.abs().max().item() for t in expected.values() if t is not None and t.numel() > 0]
    floor = _FLOOR * max([size for size in sizes if size < float("inf")], default=0.0)
    for name, wanted in expected.items():
        found = got.get(name)
        if wanted is None and found is None:
            continue
        like = wanted if wanted is not None else found
        assert like is not None
        one = torch.zeros_like(like) if wanted is None else wanted.detach()
        two = torch.zeros_like(like) if found is None else found.detach()
        if one.shape != two.shape:
            shapes = str(list(one.shape)), str(list(two.shape))
            yield Difference(clause, name, *shapes, meaning, num_tokens)
            continue
        if one.numel() == 0:
            continue
        one, two = one.double(), two.double()
        apart = (one - two).abs()
        bound = tolerance * max(one.abs().max().item(), two.abs().max().item(), floor)
        if bool((apart <= bound).all()):
            continue
        at = int(apart.nan_to_num(nan=torch.inf).argmax())
        entry = [int(i) for i in torch.unravel_index(torch.tensor(at), one.shape)]
        place = f"{name}{entry}" if entry else name
        gone = " (no gradient at all)" if found is None else ""
        told = _told(one.flatten()[at].item(), two.flatten()[at].item())
        yield Difference(clause, place, told[0], told[1] + gone, meaning, num_tokens)


def _told(one: float, two: float) -> tuple[str, str]:
    """Two numbers with the digits in which they differ, six or more."""
    for digits in range(6, 17):
        texts = f"{one:.{digits}g}", f"{two:.{digits}g}"
        if texts[0] != texts[1]:
            break
    return texts
