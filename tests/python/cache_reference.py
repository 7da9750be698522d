"""The ops of a cache, slow and obviously right, and the inputs that their tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from op_case import Inputs, wide_dtype
from situations import Situation

TABLES, BITS = 2, 3


def eighths(*shape: int, dtype: torch.dtype) -> Tensor:
    """Values whose products and sums are exact in every dtype."""
    return (torch.randint(-8, 9, shape) / 8).to(dtype)


def make_table(s: Situation, dtype: torch.dtype) -> Inputs:
    """Rows, some of them equal to keys or multiples of them, and a table with free entries."""
    entries = 2 * s.E
    keys = eighths(entries, s.H, dtype=wide_dtype(dtype))
    x = eighths(s.T, s.H, dtype=dtype)
    taken = torch.randint(0, entries, (s.T,))
    kind = torch.rand(s.T, 1)
    x = x.where(kind > 0.5, keys[taken].to(dtype))
    x = x.where((kind > 0.2) | (kind < 0.1), 2 * x)
    planes = eighths(TABLES, BITS, s.H, dtype=torch.float64)
    key_signatures = cache_signatures(keys, planes)
    key_signatures[torch.rand(entries) < 0.25] = -1
    row_mask = torch.rand(s.T) < 0.8
    return {
        "x": x,
        "signatures": cache_signatures(x, planes, row_mask),
        "keys": keys,
        "key_signatures": key_signatures,
    }


def cache_signatures(x: Tensor, planes: Tensor, row_mask: Tensor | None = None) -> Tensor:
    """One bit after the other."""
    result = torch.full((x.shape[0], planes.shape[0]), -1)
    for row, vector in enumerate(x.double()):
        length = vector.square().sum().item()
        counts = row_mask is None or bool(row_mask[row])
        if not counts or not 1e-150 <= length <= 1e150:
            continue
        for table, normals in enumerate(planes.double()):
            bits = [(normal * vector).sum().item() >= 0 for normal in normals]
            result[row, table] = sum(2**b for b, bit in enumerate(bits) if bit)
    return result


def _distance(x: Tensor, key: Tensor, similarity: float) -> float | None:
    """Of two rows that are similar; in squares, which are exact for the inputs made here."""
    x, key = x.double(), key.double()
    xx, kk, xk = (float((a * b).sum()) for a, b in ((x, x), (key, key), (x, key)))
    s = similarity**2
    similar = xk > 0 and xk * xk >= s * xx * kk and xx >= s * kk and kk >= s * xx
    return float((x - key).square().sum()) if similar else None


def _find(
    x: Tensor, signature: Tensor, keys: list[Tensor], signatures: list[Tensor], similarity: float
) -> int:
    """The nearest similar key among those that share a signature."""
    if signature[0] < 0:
        return -1
    near = []
    for entry, (key, of_key) in enumerate(zip(keys, signatures, strict=True)):
        if of_key[0] >= 0 and bool(((signature == of_key) & (signature >= 0)).any()):
            distance = _distance(x, key, similarity)
            if distance is not None:
                near.append((distance, entry))
    return min(near)[1] if near else -1


def cache_lookup(
    x: Tensor,
    signatures: Tensor,
    keys: Tensor,
    key_signatures: Tensor,
    order: Tensor,
    similarity: float,
) -> Tensor:
    """Every row against every key."""
    del order
    table = list(keys), list(key_signatures)
    found = [_find(row, of, *table, similarity) for row, of in zip(x, signatures, strict=True)]
    return torch.tensor(found, dtype=torch.int64)


def cache_insert(
    x: Tensor,
    signatures: Tensor,
    keys: Tensor,
    key_signatures: Tensor,
    last_used: Tensor,
    uses: Tensor,
    similarity: float,
    eviction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """One row after the other."""
    held, of_held = list(keys), list(key_signatures)
    taken_by = torch.full((len(held),), -1)
    last_used, uses = last_used.clone(), uses.clone()
    busy = [e for e, s in enumerate(of_held) if s[0] >= 0]
    time = max([int(last_used[e]) for e in busy], default=-1) + 1
    for number, (row, signature) in enumerate(zip(x, signatures, strict=True)):
        if signature[0] >= 0 and held:
            entry = _find(row, signature, held, of_held, similarity)
            if entry < 0:
                free = [e for e, s in enumerate(of_held) if s[0] < 0]
                rank = [(int(uses[e]), int(last_used[e]), e) for e in range(len(held))]
                if eviction == "lru":
                    rank = [(0, *r[1:]) for r in rank]
                entry = free[0] if free else min(rank)[2]
                held[entry], of_held[entry] = row, signature
                taken_by[entry], uses[entry] = number, 0
            uses[entry] += 1
            last_used[entry] = time
        time += 1
    return taken_by, last_used, uses
