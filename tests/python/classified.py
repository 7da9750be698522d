"""Texts and models to classify."""

from __future__ import annotations

import torch

from studies.classification.model import (
    ROUTERS,
    Classifier,
)
from studies.classification.texts import Texts, as_texts
from training.cleaning import Document
from training.corpus import Domain
from training.routers import is_pooled

SEQUENCE = [name for name in ROUTERS if is_pooled(name)]


def numbered(name: str, lines: int) -> Document:
    """A document in which every piece of 12 bytes is there once, and in no other document."""
    return Document(name, "".join(f"{name}{line:08d}\n" for line in range(lines)))


DOMAINS = [
    Domain("a", [numbered("A", 300), numbered("B", 200)], [numbered("C", 150)]),
    Domain("b", [numbered("D", 300)], [numbered("E", 90), numbered("F", 60)]),
]


def lively(router: str, classes: int = 3) -> Classifier:
    """A model none of whose parameters is 0, which would hide what the others do."""
    torch.manual_seed(0)
    model = Classifier(router, classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def random_texts(*lengths: int) -> Texts:
    generator = torch.Generator().manual_seed(1)
    pieces = [torch.randint(0, 256, (length,), generator=generator) for length in lengths]
    return as_texts([piece.to(torch.uint8) for piece in pieces], [0] * len(lengths))
