"""Pieces of text and the class that each comes from.

Shapes: N texts, S positions, the first of which holds CLS and the others bytes or padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from train_lm import VOCABULARY
from training import cleaning
from training.cleaning import Document
from training.corpus import CorpusError, Domain, as_bytes
from training.settings import SettingsError

SHORTEST, LONGEST = 48, 128  # bytes
CLS = VOCABULARY  # behind the bytes
TEST_PER_CLASS = 512  # at most
TRAIN_SHARE = 0.85  # of a document whose pieces are to be told from those of others
TEST_SEED = 0  # of the cuts, which are the same for every run


@dataclass(frozen=True)
class Texts:
    """Texts of different lengths."""

    tokens: Tensor
    """int64 [N, S], CLS first."""
    token_mask: Tensor
    """bool [N, S], True where there is CLS or a byte, False where there is padding."""
    labels: Tensor
    """int64 [N], each the place of a class."""

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, first: int, end: int) -> Texts:
        """Some of them, padded no further than the longest needs."""
        mask = self.token_mask[first:end]
        longest = int(mask.sum(dim=1).max())
        return Texts(self.tokens[first:end, :longest], mask[:, :longest], self.labels[first:end])

    def bytes_of(self, text: int) -> Tensor:
        """One text without CLS and padding, uint8."""
        return self.tokens[text, self.token_mask[text]][1:].to(torch.uint8)

    def sha256(self) -> str:
        """A hash of every byte and label."""
        total = hashlib.sha256()
        for part in (self.tokens, self.token_mask, self.labels):
            total.update(part.contiguous().numpy().tobytes())
        return total.hexdigest()


@dataclass(frozen=True)
class Task:
    """What is to be told apart, and from what to learn it."""

    name: str
    classes: tuple[str, ...]
    train: list[list[Tensor]]
    """The documents of each class, uint8."""
    test: Texts
    """None of which overlaps with another or with what trains."""


def as_texts(pieces: Sequence[Tensor], labels: Sequence[int]) -> Texts:
    """Puts CLS before each piece, uint8, and padding behind it."""
    cls = torch.tensor([CLS])
    rows = [torch.cat([cls, piece.long()]) for piece in pieces]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = pad_sequence(rows, batch_first=True)
    return Texts(tokens, torch.arange(tokens.shape[1]) < lengths[:, None], torch.tensor(labels))


# ---- the tasks


def domain_task(domains: Sequence[Domain]) -> Task:
    """Which domain a text is from; files that train and files that test are the corpus's."""
    return make_task(
        "domain",
        [domain.name for domain in domains],
        [domain.train for domain in domains],
        [domain.held_out for domain in domains],
    )


def module_task(domains: Sequence[Domain], name: str, modules: int) -> Task:
    """Which of a domain's longest documents a text is from: the head trains, the tail tests.

    Between the two is a gap of LONGEST characters, and a paragraph of any head that shares a run of
    words with any tail is cut out.
    """
    documents = [
        document
        for domain in domains
        if domain.name == name
        for document in (*domain.train, *domain.held_out)
    ]
    if not documents:
        known = ", ".join(domain.name for domain in domains)
        raise SettingsError(f"--domain must be one of {known}, got {name}")
    if len(documents) < modules:
        raise SettingsError(
            f"--modules must be at most {len(documents)}, the documents of {name}, got {modules}"
        )
    documents.sort(key=lambda document: (-len(document.text.encode()), document.name))
    heads, tails = zip(*(split(document) for document in documents[:modules]), strict=True)
    kept = {head.name: [head] for head in cleaning.without_overlap(heads, tails)}
    names = [document.name for document in documents[:modules]]
    return make_task(
        f"module of {name}",
        names,
        [kept.get(document, []) for document in names],
        [[tail] for tail in tails],
    )


def split(document: Document) -> tuple[Document, Document]:
    """What trains and what tests of a document whose own pieces are the class."""
    end = round(TRAIN_SHARE * len(document.text))
    head, tail = document.text[:end], document.text[end + LONGEST :]
    return Document(document.name, head), Document(document.name, tail)


def make_task(
    name: str,
    classes: Sequence[str],
    train: Sequence[Iterable[Document]],
    test: Sequence[Iterable[Document]],
) -> Task:
    """Cuts what tests into texts, equally many of each class.

    Raises:
        CorpusError: a class has too little text.
        SettingsError: there is but one class.
    """
    if len(classes) < 2:
        raise SettingsError(f"--data must name at least two paths for --task {name}, got 1")
    generator = torch.Generator().manual_seed(TEST_SEED)
    training = [
        [data for document in documents if len(data := as_bytes([document])) >= LONGEST]
        for documents in train
    ]
    pieces = [
        [piece for document in documents for piece in cut(as_bytes([document]), generator)]
        for documents in test
    ]
    for label, place in zip(classes, range(len(classes)), strict=True):
        if not training[place] or not pieces[place]:
            raise CorpusError(f"{label}: too little text to train and test with, in --task {name}")
    count = min(TEST_PER_CLASS, *map(len, pieces))
    chosen = [
        of_class[place]
        for of_class in pieces
        for place in torch.randperm(len(of_class), generator=generator)[:count].tolist()
    ]
    labels = [place for place in range(len(classes)) for _ in range(count)]
    return Task(name, tuple(classes), training, as_texts(chosen, labels))


def cut(document: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Consecutive pieces of random lengths, which do not overlap; what is left is not used."""
    pieces = []
    start = 0
    while len(document) - start >= SHORTEST:
        length = int(torch.randint(SHORTEST, LONGEST + 1, (), generator=generator))
        if start + length <= len(document):
            pieces.append(document[start : start + length])
        start += length
    return pieces


class Stream:
    """Endless batches of training texts, which depend on the seed alone.

    Each class is as frequent as the others, and each place of its documents as the others.
    """

    def __init__(self, task: Task, seed: int) -> None:
        """Lists the places where a text may start."""
        self.generator = torch.Generator().manual_seed(seed)
        self.text = [torch.cat(documents) for documents in task.train]
        self.starts = [starts_in(documents) for documents in task.train]

    def batch(self, size: int) -> Texts:
        """So many texts."""
        labels = torch.randint(len(self.text), (size,), generator=self.generator)
        lengths = torch.randint(SHORTEST, LONGEST + 1, (size,), generator=self.generator)
        place = torch.rand(size, dtype=torch.float64, generator=self.generator)
        pieces = []
        for label, length, share in zip(
            labels.tolist(), lengths.tolist(), place.tolist(), strict=True
        ):
            starts = self.starts[label]
            start = int(starts[int(share * len(starts))])
            pieces.append(self.text[label][start : start + length])
        return as_texts(pieces, labels.tolist())


def starts_in(documents: Sequence[Tensor]) -> Tensor:
    """Where in the joined documents the longest text fits into one of them, int64 [P]."""
    ends = torch.tensor([len(document) for document in documents]).cumsum(0).tolist()
    return torch.cat(
        [
            torch.arange(end - len(document), end - LONGEST + 1)
            for document, end in zip(documents, ends, strict=True)
        ]
    )
