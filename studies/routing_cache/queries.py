"""Texts that come again, as they were or paraphrased, to an encoder that routes whole texts.

Shapes: N texts, L layers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from studies.classification import program as classification
from studies.classification.evaluation import BATCH
from studies.classification.model import Classifier
from studies.classification.texts import CLS, Task, Texts
from studies.classification.training import fit
from studies.classification.yardsticks import measure
from studies.routing_cache.caching import Tally, entries_of, put_caches, update
from studies.routing_cache.scale import SIMILARITIES, Scale
from torchmoe import RoutingCache
from torchmoe.nn import Routing
from training.figures import Values

ROUTERS = ("sequence_mean", "sequence_attention")
EXACT, UNSEEN = "exact", "unseen"
SHARES = {"2 %": 0.02, "5 %": 0.05, "10 %": 0.1, "20 %": 0.2}
QUERIES = (EXACT, *SHARES, UNSEEN)


@dataclass(frozen=True)
class Answer:
    """What the caches make of some texts."""

    hit_rate: Values
    """[L]."""
    own: Values
    """[L], the share of the hits that find what the text itself finds when it comes unchanged."""
    agreement: Values
    """[L], NaN without a hit."""
    change: float
    """Loss with the caches minus loss without, bits per text."""


@dataclass(frozen=True)
class Found:
    """One trained model with every similarity."""

    texts: int
    """That are remembered."""
    accuracy: float
    """Of the texts that are remembered, without caches."""
    bits: float
    """Their loss."""
    nbytes: dict[float, int]
    """Of the caches of all layers together, by similarity."""
    answers: dict[float, dict[str, Answer]]
    """By similarity and by what becomes of the texts."""


def study(router: str, task: Task, seed: int, scale: Scale) -> Found:
    """Trains an encoder, lets caches remember some texts, and asks again."""
    fitted = fit(router, task, seed, scale.steps, classification.LR, lambda: None)
    model = fitted.model.eval()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(task.test), generator=generator)
    count = min(scale.texts, len(order) // 2)
    known, unseen = (pick(task.test, some) for some in torch.split(order[: 2 * count], count))
    queries = {EXACT: known}
    queries |= {name: paraphrased(known, share, generator) for name, share in SHARES.items()}
    queries[UNSEEN] = unseen
    plain = {name: bits(forward(model, texts)[0], texts) for name, texts in queries.items()}
    answers: dict[float, dict[str, Answer]] = {}
    nbytes: dict[float, int] = {}
    for similarity in SIMILARITIES:
        caching = copy.deepcopy(model)
        caches = put_caches(caching, lambda s=similarity: RoutingCache(count, s))  # type: ignore[misc]
        forward(caching, known, caches)
        answers[similarity] = ask(caching, caches, queries, plain)
        nbytes[similarity] = sum(cache.nbytes for cache in caches)
    score = measure(forward(model, known)[0], known.labels)
    return Found(count, score.accuracy, score.bits, nbytes, answers)


def ask(
    model: Classifier,
    caches: list[RoutingCache],
    queries: Mapping[str, Texts],
    plain: Mapping[str, float],
) -> dict[str, Answer]:
    """What the caches, which stay as they are, make of each kind of query."""
    answers = {}
    for name, texts in queries.items():
        logits, routings = forward(model, texts)
        tally = Tally(caches)
        for of_batch in routings:
            tally.add(of_batch)
        found = np.stack([np.concatenate(one) for one in zip(*entries(routings), strict=True)])
        if name == EXACT:
            unchanged = found
        hits = found >= 0
        same = (hits & (found == unchanged)).sum(axis=1).astype(float)
        none = np.full(len(caches), np.nan)
        count = hits.sum(axis=1)
        own = none if name == UNSEEN else np.divide(same, count, out=none, where=count > 0)
        change = bits(logits, texts) - plain[name]
        answers[name] = Answer(tally.hit_rate, own, tally.agreement, change)
    return answers


def entries(routings: list[list[Routing]]) -> list[list[Values]]:
    """What each batch's texts have found in each layer."""
    return [[entries_of(routing).numpy() for routing in of_batch] for of_batch in routings]


@torch.no_grad()
def forward(
    model: Classifier, texts: Texts, caches: list[RoutingCache] | None = None
) -> tuple[Tensor, list[list[Routing]]]:
    """The logits of all texts, and the routings of each batch; caches that are given remember."""
    logits, routings = [], []
    for first in range(0, len(texts), BATCH):
        scores = model(texts.part(first, first + BATCH))
        if caches is not None:
            update(caches, scores.routings)
        logits.append(scores.logits)
        routings.append(scores.routings)
    return torch.cat(logits), routings


def bits(logits: Tensor, texts: Texts) -> float:
    """Cross-entropy of the right class."""
    return measure(logits, texts.labels).bits


def pick(texts: Texts, places: Tensor) -> Texts:
    """Some texts."""
    return Texts(texts.tokens[places], texts.token_mask[places], texts.labels[places])


def paraphrased(texts: Texts, share: float, generator: torch.Generator) -> Texts:
    """The texts with each byte drawn anew, with that probability, from the bytes of all of them."""
    is_byte = texts.token_mask & (texts.tokens != CLS)
    pool = texts.tokens[is_byte]
    drawn = pool[torch.randint(len(pool), texts.tokens.shape, generator=generator)]
    changes = is_byte & (torch.rand(texts.tokens.shape, generator=generator) < share)
    return Texts(drawn.where(changes, texts.tokens), texts.token_mask, texts.labels)
