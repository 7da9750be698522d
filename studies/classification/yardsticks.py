"""What there is to beat: the most frequent class, and naive Bayes over byte n-grams."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from studies.classification.texts import Task
from training import ngrams
from training.language_model import bits
from training.ngrams import NGrams

ORDERS = (3, 5)


class Yardstick(NamedTuple):
    """How well something without experts does."""

    accuracy: float
    bits: float  # cross-entropy of the right class


def measure(logits: Tensor, labels: Tensor) -> Yardstick:
    """The share of the texts whose best class is right, and the bits that the right one costs.

    Args:
        logits: [N, C].
        labels: int64 [N].
    """
    right = logits.argmax(dim=1) == labels
    return Yardstick(
        float(right.double().mean()), bits(functional.cross_entropy(logits.double(), labels).item())
    )


def majority(task: Task) -> Yardstick:
    """Always says the class that most test texts have; all have it, since there are as many."""
    shares = torch.bincount(task.test.labels) / len(task.test)
    return Yardstick(float(shares.max()), float(-(shares * shares.log2()).sum()))


def naive_bayes(task: Task, orders: tuple[int, ...] = ORDERS) -> dict[str, Yardstick]:
    """The class whose own n-gram model finds the text most likely, by order.

    A class is as likely before as any other. The models read all text that trains; the first byte
    of a text, for which there is none before, does not count.
    """
    models = [ngrams.fit(documents, max(orders)) for documents in task.train]
    return {
        f"naive Bayes, {order}-grams": measure(
            log_likelihood(task, models, order), task.test.labels
        )
        for order in orders
    }


def log_likelihood(task: Task, models: list[NGrams], order: int) -> Tensor:
    """Of each test text under each class's model, in nats: float64 [N, C]."""
    counted = task.test.token_mask[:, 2:]  # neither CLS nor the first byte
    costs = [
        model.bits(task.test.tokens[:, 1:], order).where(counted, 0).sum(dim=1) for model in models
    ]
    return -math.log(2) * torch.stack(costs, dim=1)
