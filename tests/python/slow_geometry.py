"""What the geometry of a router says, in loops."""

from __future__ import annotations

import math

import torch

from torchmoe.monitor import RouterGeometry

EPS = torch.finfo(torch.float64).eps


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def slow_logits(got: RouterGeometry, z: list[float]) -> list[float]:
    return [dot(w, z) + b for w, b in zip(got.rows.tolist(), got.bias.tolist(), strict=True)]


def slow_choice(logits: list[float], top_k: int) -> list[int]:
    return sorted(range(len(logits)), key=lambda expert: (-logits[expert], expert))[:top_k]


def slow_flip(got: RouterGeometry, z: list[float], top_k: int) -> tuple[float, int, int]:
    rows, logits = got.rows.tolist(), slow_logits(got, z)
    best = (math.inf, -1, -1)
    chosen = slow_choice(logits, top_k)
    for c in chosen:
        for u in range(len(rows)):
            span = math.dist(rows[c], rows[u])
            if u not in chosen and span > 0 and (logits[c] - logits[u]) / span < best[0]:
                best = ((logits[c] - logits[u]) / span, c, u)
    return best
