"""The balancing terms from their formulas, one token and one expert at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import reference

T, E, K = 23, 5, 2
F64, F32 = torch.float64, torch.float32
INF, NAN = math.inf, math.nan


# --- the formulas, one token and one expert at a time -------------------------------------------


def cv_squared(values: list[Tensor]) -> Tensor:
    mean = sum(values) / len(values)
    if mean == 0:
        return mean * 0
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def counted(mask: Tensor | None, num_tokens: int) -> list[int]:
    return [t for t in range(num_tokens) if mask is None or mask[t]]


def importance(
    weights: Tensor, indices: Tensor, num_experts: int, token_mask: Tensor | None = None
) -> Tensor:
    zero = weights.new_zeros((), dtype=F64)
    totals = [zero] * num_experts
    for t in counted(token_mask, len(weights)):
        for j, expert in enumerate(indices[t].tolist()):
            if reference.is_routed(expert, num_experts):
                totals[expert] = totals[expert] + weights[t, j].double()
    return cv_squared(totals)


def normal_cdf(x: Tensor) -> Tensor:
    return (1 + torch.erf(x / math.sqrt(2))) / 2


def load(
    logits: Tensor,
    top_k: int,
    noisy_logits: Tensor | None = None,
    deviation: float | None = None,
    token_mask: Tensor | None = None,
) -> Tensor:
    num_tokens, num_experts = logits.shape
    noisy = logits if noisy_logits is None else noisy_logits
    deviation = 1 / num_experts if deviation is None else deviation
    totals = [logits.new_zeros((), dtype=F64)] * num_experts
    for t in counted(token_mask, num_tokens):
        for i in range(num_experts):
            others = sorted(
                (noisy[t, e].double() for e in range(num_experts) if e != i),
                key=lambda value: value.detach().item(),
                reverse=True,
            )
            chance = torch.ones((), dtype=F64)
            if top_k < num_experts:
                chance = normal_cdf((logits[t, i].double() - others[top_k - 1]) / deviation)
            totals[i] = totals[i] + chance
    return cv_squared(totals)


def share(row: Tensor, score_function: str) -> Tensor:
    p = reference.probabilities(row.double(), score_function)
    return p / p.sum()


def entropy(q: Tensor) -> Tensor:
    terms = [-x * x.log() for x in q if x > 0]
    return sum(terms, q.new_zeros(()))


def local_entropy(logits: Tensor, score_function: str, token_mask: Tensor | None = None) -> Tensor:
    rows = counted(token_mask, len(logits))
    entropies = [entropy(share(logits[t], score_function)) for t in rows]
    return sum(entropies, logits.new_zeros((), dtype=F64)) / max(len(rows), 1)


def mean_share(logits: Tensor, score_function: str, token_mask: Tensor | None) -> Tensor:
    rows = counted(token_mask, len(logits))
    return sum(share(logits[t], score_function) for t in rows) / len(rows)


def global_entropy(logits: Tensor, score_function: str, token_mask: Tensor | None = None) -> Tensor:
    return math.log(logits.shape[1]) - entropy(mean_share(logits, score_function, token_mask))


def mutual_information(
    logits: Tensor, score_function: str, token_mask: Tensor | None = None
) -> Tensor:
    of_mean = entropy(mean_share(logits, score_function, token_mask))
    return local_entropy(logits, score_function, token_mask) - of_mean
