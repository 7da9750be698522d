"""The documents of the repository, read as their readers see them."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
#: A number that is no part of a word: the digits of "float32" are text.
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.(?P<decimals>\d+))?(?:e(?P<exponent>[+-]\d+))?(?!\w)")
SPENT = re.compile(r"\d+(?:\.\d+)? m?s\b")


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


@functools.cache
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


def printed_by(page: Path, block: Block, names: dict[str, object]) -> str:
    """What a block prints; its lines in a traceback are the page's."""
    printed = io.StringIO()
    code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return printed.getvalue()


def differences(expected: str, actual: str, tolerance: float, last_digits: int = 1) -> list[str]:
    """The lines that say something else; how wide a column is says nothing.

    Args:
        expected: what the page shows.
        actual: what was printed.
        tolerance: relative, of numbers with a decimal point or an exponent; others are exact, and
            a time is a time, whatever it is.
        last_digits: by how much the last digit shown may be off instead.
    """
    lines = zip_longest(
        expected.strip().splitlines(), actual.strip().splitlines(), fillvalue="(nothing)"
    )
    return [
        f"the page: {want}\nprinted:  {got}"
        for want, got in lines
        if not _same_line(SPENT.sub("TIME", want), SPENT.sub("TIME", got), tolerance, last_digits)
    ]


def _same_line(expected: str, actual: str, tolerance: float, last_digits: int) -> bool:
    words, others = (NUMBER.sub(" # ", line).split() for line in (expected, actual))
    if words != others:
        return False
    numbers = zip(NUMBER.finditer(expected), NUMBER.finditer(actual), strict=True)
    return all(_agrees(*pair, tolerance, last_digits) for pair in numbers)


def _agrees(
    expected: re.Match[str], actual: re.Match[str], tolerance: float, last_digits: int
) -> bool:
    exact = [
        number["decimals"] is None and number["exponent"] is None for number in (expected, actual)
    ]
    if any(exact):
        return expected[0] == actual[0]
    unit = 10.0 ** (int(expected["exponent"] or 0) - len(expected["decimals"] or ""))
    allowed = max(tolerance * abs(float(expected[0])), (last_digits + 0.001) * unit)
    return abs(float(actual[0]) - float(expected[0])) <= allowed
