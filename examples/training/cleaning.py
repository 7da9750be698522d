"""Which text is worth training on: no licences, nothing generated, nothing twice, no leak.

A language model looks better than it is on text that repeats itself, and on held-out text that it
has seen. These functions decide what stays; corpus.py reads the files.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

# A run of this many equal words is copied, not coincidence: the length that GPT-3 was checked with.
RUN_WORDS = 13
# A file that shares more of its runs than this with the files before it is a near-duplicate.
NEAR_DUPLICATE_SHARE = 0.3
# Code and prose written by people compress to 0.2 to 0.4 of their size; tables, lists of overloads
# and other text that a program wrote stay below this.
REPETITIVE_RATIO = 0.15
# Too short to tell a repetitive text from a short one, and too short to learn from.
SMALLEST_DOCUMENT = 400

GENERATED = re.compile(
    r"@generated|do not edit|(?:auto-?|automatically )generated|generated (?:by|from|file)",
    re.IGNORECASE,
)
LICENCE_PHRASES = (
    "copyright",
    "licens",
    "licenc",
    "all rights reserved",
    "public domain",
    "permission is hereby",
    "permission to use",
    "redistribut",
    "warrant",
)
PYTHON_COMMENTS = re.compile(r"(?:^[ \t]*#[^\n]*(?:\n|\Z))+", re.MULTILINE)
CPP_COMMENTS = re.compile(r"/\*.*?\*/|(?:^[ \t]*//[^\n]*(?:\n|\Z))+", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Document:
    """One file's text, cleaned, under a name that is the same on every machine."""

    name: str
    text: str

    @cached_property
    def runs(self) -> frozenset[int]:
        """Hashes of all runs of RUN_WORDS words inside the paragraphs."""
        return frozenset(run for paragraph in paragraphs(self.text) for run in word_runs(paragraph))


def paragraphs(text: str) -> list[str]:
    """The pieces between blank lines; joined by blank lines they are the text again."""
    return re.split(r"\n[ \t]*\n", text)


def word_runs(text: str) -> Iterator[int]:
    """Hash of each run of RUN_WORDS words; punctuation and line breaks do not count."""
    words = re.findall(r"\w+", text)
    return map(hash, zip(*(words[start:] for start in range(RUN_WORDS)), strict=False))


def mentions_licence(text: str) -> bool:
    """Whether the text speaks of owners and permissions."""
    lower = text.lower()
    return any(phrase in lower for phrase in LICENCE_PHRASES)


def strip_licences(text: str, comments: re.Pattern[str]) -> str:
    """Removes each block of comments that states who owns the text or what may be done with it."""
    return comments.sub(lambda block: "" if mentions_licence(block[0]) else block[0], text)


def tidy(text: str) -> str:
    """Removes the holes that stripping leaves: blank lines at the ends, more than two in a row."""
    return re.sub(r"\n(?:[ \t]*\n){3,}", "\n\n\n", text).strip("\n") + "\n"


def is_generated(text: str) -> bool:
    """Whether the head of the file says that a program wrote it."""
    return GENERATED.search(text, 0, 3000) is not None


def is_worth_reading(text: str) -> bool:
    """Whether the text is long enough, free of licences and not a table of repetitions."""
    data = text.encode()
    if len(data) < SMALLEST_DOCUMENT or mentions_licence(text):
        return False
    return len(zlib.compress(data)) >= REPETITIVE_RATIO * len(data)


def without_near_duplicates(documents: Iterable[Document]) -> Iterator[Document]:
    """Passes on the documents that are mostly new compared with those passed on before."""
    seen: set[int] = set()
    for document in documents:
        if document.runs and len(document.runs & seen) <= NEAR_DUPLICATE_SHARE * len(document.runs):
            seen |= document.runs
            yield document


def without_overlap(train: Iterable[Document], held_out: Iterable[Document]) -> list[Document]:
    """Cuts every paragraph out of `train` that has a run of words in common with `held_out`.

    The training text gives way, so that the held-out text stays as people wrote it.
    """
    forbidden: set[int] = set().union(*(document.runs for document in held_out))
    kept = []
    for document in train:
        text = document.text
        if not forbidden.isdisjoint(document.runs):
            clean = (p for p in paragraphs(text) if forbidden.isdisjoint(word_runs(p)))
            text = tidy("\n\n".join(clean))
        if len(text) >= SMALLEST_DOCUMENT:
            kept.append(Document(document.name, text))
    return kept
