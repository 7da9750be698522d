"""What a trained model does with the test texts: right or wrong, and which experts it asks.

Shapes: N texts, S positions, L blocks, E experts, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from studies.classification.model import EXPERTS, Classifier
from studies.classification.texts import CLS, Texts
from studies.classification.yardsticks import Yardstick, measure
from torchmoe.nn import Routing
from training.specialization import BYTE_CLASSES, class_of_each_value

BATCH = 128
KINDS = ("CLS", *BYTE_CLASSES)  # of a position
NORMAL_95 = 1.959964  # standard deviations to each side that hold 95 % of a normal distribution


@dataclass(frozen=True)
class Findings:
    """One trained model on all test texts."""

    score: Yardstick
    load: Tensor
    """Slots of each expert, int64 [L, E]."""
    experts_per_text: Tensor
    """How many experts serve a text at once, the mean over the texts: float64 [L]."""
    shares: Tensor
    """Share of the slots of each text that the expert serves, [L, N, E]."""
    favourites: Tensor
    """Share of the positions of each text that has the expert as first choice, [L, N, E]."""
    slots_by_kind: Tensor
    """Experts that serve a position, the mean over those of each of KINDS: float64 [L, kinds]."""
    frequency: Tensor
    """Share of the positions that are of each of KINDS, float64."""
    pooling: Tensor | None
    """Pooling weights, [L, N, S], where the router has some."""

    @property
    def max_violation(self) -> float:
        """Largest load / mean load - 1, the mean over the blocks."""
        load = self.load.double()
        return float((load.amax(dim=1) / load.mean(dim=1) - 1).mean())


def by_class(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The mean over each class's texts, [L, N, E] to [L, C, E]."""
    return torch.stack([values[:, labels == own].mean(dim=1) for own in range(classes)], dim=1)


@torch.no_grad()
def evaluate(model: Classifier, texts: Texts) -> Findings:
    """Runs the model over all texts."""
    model.eval()
    logits: list[Tensor] = []
    parts: list[list[Part]] = []
    for first in range(0, len(texts), BATCH):
        some = texts.part(first, first + BATCH)
        scores = model(some)
        logits.append(scores.logits)
        parts.append([Part.of(routing, some, texts) for routing in scores.routings])
    model.train()
    layers = [Part.joined([part[layer] for part in parts]) for layer in range(len(parts[0]))]
    kinds = kinds_of(texts)[texts.token_mask]
    positions = torch.bincount(kinds, minlength=len(KINDS)).double()
    by_kind = [
        torch.bincount(kinds, layer.experts[texts.token_mask].double(), len(KINDS)) / positions
        for layer in layers
    ]
    pooling = [layer.pooling for layer in layers if layer.pooling is not None]
    return Findings(
        score=measure(torch.cat(logits), texts.labels),
        load=torch.stack([layer.slots.sum(dim=0) for layer in layers]),
        experts_per_text=torch.stack(
            [(layer.slots > 0).sum(dim=1).double().mean() for layer in layers]
        ),
        shares=torch.stack([parts_of(layer.slots) for layer in layers]),
        favourites=torch.stack([parts_of(layer.first) for layer in layers]),
        slots_by_kind=torch.stack(by_kind),
        frequency=positions / positions.sum(),
        pooling=torch.stack(pooling) if pooling else None,
    )


@dataclass(frozen=True)
class Part:
    """What one block does with some texts."""

    slots: Tensor  # int64 [N, E]: of each expert
    first: Tensor  # int64 [N, E]: positions that have it as first choice
    experts: Tensor  # int64 [N, S]: that serve a position
    pooling: Tensor | None  # [N, S]

    @classmethod
    def of(cls, routing: Routing, some: Texts, texts: Texts) -> Part:
        """Counts what was routed; padded as all texts are."""
        indices = routing.indices.view(*some.tokens.shape, -1)  # [n, s, K]
        missing = texts.tokens.shape[1] - some.tokens.shape[1]
        pad = torch.nn.functional.pad
        weights = routing.details.get("pooling_weights")
        return cls(
            slots=count(indices.flatten(1)),
            first=count(indices[:, :, 0]),
            experts=pad((indices >= 0).sum(dim=2), (0, missing)),
            pooling=None if weights is None else pad(weights, (0, missing)),
        )

    @classmethod
    def joined(cls, parts: list[Part]) -> Part:
        """Those of all texts."""
        pooling = [part.pooling for part in parts if part.pooling is not None]
        return cls(
            torch.cat([part.slots for part in parts]),
            torch.cat([part.first for part in parts]),
            torch.cat([part.experts for part in parts]),
            torch.cat(pooling) if pooling else None,
        )


def parts_of(counts: Tensor) -> Tensor:
    """Each count over the sum of its row, [N, E]."""
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)


def count(indices: Tensor) -> Tensor:
    """How often each expert is in each row, int64 [N, M] with -1 for none to [N, E]."""
    hot = torch.nn.functional.one_hot(indices + 1, EXPERTS + 1)  # [N, M, 1 + E]
    return hot.sum(dim=1)[:, 1:]


def kinds_of(texts: Texts) -> Tensor:
    """The place in KINDS of each position, int64 [N, S]."""
    table = torch.cat([class_of_each_value() + 1, torch.tensor([0])])
    assert len(table) == CLS + 1
    return table[texts.tokens]


def wilson(accuracy: float, texts: int) -> tuple[float, float]:
    """The ends of the 95 % interval of a share of so many independent texts (Wilson's)."""
    z2 = NORMAL_95**2 / texts
    middle = (accuracy + z2 / 2) / (1 + z2)
    reach = math.sqrt(z2 * (accuracy * (1 - accuracy) + z2 / 4)) / (1 + z2)
    return max(0.0, middle - reach), min(1.0, middle + reach)
