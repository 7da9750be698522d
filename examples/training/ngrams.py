"""Byte n-gram models with Witten-Bell interpolation: the yardstick for the neural model.

A model of order n predicts a byte c from the n-1 bytes h before it. h' is h without its first byte.

    P_n(c|h) = (count(h c) + T(h) * P_{n-1}(c|h')) / (count(h) + T(h))

count(h c) is how often c followed h, count(h) how often any byte did, T(h) how many different bytes
did. A context that was never followed leaves P_{n-1}, and P_0 is 1/256. All counts are exact:
those of order n come from every n consecutive bytes of a text, so those of a lower order also come
from the first bytes of each text, which have fewer bytes before them.

Shapes: W windows, S bytes predicted in each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

HIGHEST_ORDER = 7  # an n-gram is the big-endian number of its bytes and must fit an int64
PAST_ALL = torch.tensor([2**63 - 1])  # sorts behind every n-gram
NOTHING = torch.tensor([0])


class Table(NamedTuple):
    """The counts of one order.

    Both lists of keys are sorted and end with PAST_ALL, counted 0: every search ends on an entry.
    """

    grams: Tensor  # int64 [G], the different n-grams
    counts: Tensor  # int64 [G], count(h c)
    contexts: Tensor  # int64 [C], the different n-grams without their last byte
    totals: Tensor  # int64 [C], count(h)
    distinct: Tensor  # int64 [C], T(h)


@dataclass(frozen=True)
class NGrams:
    """The models of every order up to the number of tables."""

    tables: tuple[Table, ...]

    def bits(self, windows: Tensor, order: int) -> Tensor:
        """What each byte of each window costs, the first left out.

        A byte is predicted from up to `order - 1` bytes before it inside its window: near the
        start of a window a lower order takes over, as a neural model sees no more there.

        Args:
            windows: bytes, uint8 or int64 [W, S+1].
            order: the order of the model, at most the one that was fitted.

        Returns:
            -log2 P of bytes 1 to S, float64 [W, S].
        """
        if not 1 <= order <= len(self.tables):
            raise ValueError(f"order must be from 1 to {len(self.tables)}, got {order}")
        p = torch.full(windows.shape, 1 / 256, dtype=torch.float64)  # [W, S+1], of byte 0 too
        for n, table in enumerate(self.tables[:order], start=1):
            part = p[:, n - 1 :]  # an n-gram inside the window ends on byte n-1 or later
            part.copy_(interpolate(table, grams(windows, n), part))
        return -p[:, 1:].log2()


def fit(texts: list[Tensor], order: int) -> NGrams:
    """Counts the n-grams of every order up to `order`; none spans two texts.

    Args:
        texts: bytes, uint8 [N], each of its own length.
        order: the highest order that the result can serve, 1 to HIGHEST_ORDER.
    """
    if not 1 <= order <= HIGHEST_ORDER:
        raise ValueError(f"order must be from 1 to {HIGHEST_ORDER}, got {order}")
    return NGrams(tuple(count_grams(texts, n) for n in range(1, order + 1)))


def count_grams(texts: list[Tensor], n: int) -> Table:
    """The table of order `n` of the texts, uint8 [N] each."""
    keys = torch.cat([torch.empty(0, dtype=torch.int64), *(grams(text, n) for text in texts)])
    keys = torch.from_numpy(np.sort(keys.numpy()))  # torch's own sort takes several times as long
    unique, counts = unique_counts(keys)
    # Sorted n-grams have sorted contexts, each a run as long as there are bytes that follow it.
    contexts, distinct = unique_counts(unique >> 8)
    _, totals = unique_counts(keys >> 8)
    return Table(
        grams=torch.cat((unique, PAST_ALL)),
        counts=torch.cat((counts, NOTHING)),
        contexts=torch.cat((contexts, PAST_ALL)),
        totals=torch.cat((totals, NOTHING)),
        distinct=torch.cat((distinct, NOTHING)),
    )


def unique_counts(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The different values of sorted keys [N] and how often each occurs, int64 [U] both."""
    unique, counts = torch.unique_consecutive(keys, return_counts=True)
    return unique, counts


def grams(text: Tensor, n: int) -> Tensor:
    """Every n consecutive bytes of the last dimension as one number, [..., N] to [..., N-n+1]."""
    length = max(0, text.shape[-1] - n + 1)
    keys = torch.zeros((*text.shape[:-1], length), dtype=torch.int64)
    for start in range(n):
        keys = keys << 8 | text[..., start : start + length]
    return keys


def interpolate(table: Table, keys: Tensor, lower: Tensor) -> Tensor:
    """P_n of the n-grams `keys`, int64 [W, M], from P_{n-1} of the same bytes, float64 [W, M]."""
    gram = torch.searchsorted(table.grams, keys)
    counts = table.counts[gram] * (table.grams[gram] == keys)
    context = torch.searchsorted(table.contexts, keys >> 8)
    known = table.contexts[context] == keys >> 8
    totals = table.totals[context] * known
    # Where the context is unknown all counts are 0: a weight of 1 in place of T leaves `lower`.
    weight = torch.where(known, table.distinct[context], 1)
    return (counts + weight * lower) / (totals + weight)
