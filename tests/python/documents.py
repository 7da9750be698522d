"""The documents of the repository, read as their readers see them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Block:
    """A block of code."""

    #: What stands after the fence, "" for an indented block.
    language: str
    text: str
    #: The number of the block's first line of text, from 1.
    line: int
    #: What it prints: the text block that follows with nothing in between, if there is one.
    output: str | None


def _tokens(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text())


def blocks(path: Path) -> list[Block]:
    """Every block of code, in order."""
    tokens = _tokens(path)
    found = []
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type not in ("fence", "code_block"):
            continue
        assert token.map is not None
        prints = following is not None and (following.type, following.info) == ("fence", "text")
        first = token.map[0] + 1 + (token.type == "fence")
        output = following.content if prints and following is not None else None
        found.append(Block(token.info.strip(), token.content, first, output))
    return found


def code_spans(path: Path) -> list[str]:
    """What stands between backticks inside of sentences and tables."""
    return [inline.content for inline in _inlines(path) if inline.type == "code_inline"]


def links(path: Path) -> list[str]:
    """Where links lead and pictures come from."""
    found = [inline.attrGet("href") or inline.attrGet("src") for inline in _inlines(path)]
    return [str(target) for target in found if target]


def tables(path: Path) -> list[list[list[str]]]:
    """The cells of every table, as Markdown; the first row is the head."""
    found: list[list[list[str]]] = []
    for token in _tokens(path):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and found and token.level >= 4:
            found[-1][-1].append(token.content)
    return found


def anchors(path: Path) -> set[str]:
    """The names by which the repository's host knows the headings."""
    tokens = _tokens(path)
    titles = [b.content for a, b in pairwise(tokens) if a.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


def _inlines(path: Path) -> Iterator[Token]:
    for token in _tokens(path):
        yield from token.children or ()
