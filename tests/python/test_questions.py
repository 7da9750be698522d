"""The answers of docs/questions.md: every block runs by itself and prints what the page says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from documents import NUMBER, ROOT, Block, anchors, blocks, differences, printed_by

PAGE = ROOT / "docs" / "questions.md"
#: Relative, of a number with a decimal point, where a section states none.
TOLERANCE = 0.02
STATED = re.compile(r"decimals\s+agree\s+within\s+(\d+)\s+%", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """A section of the page."""

    title: str
    #: Of the numbers with a decimal point in its outputs.
    tolerance: float
    blocks: list[Block]


def read_questions() -> list[Question]:
    lines = PAGE.read_text().splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("## ")]
    questions = []
    for start, end in pairwise([*starts, len(lines)]):
        stated = STATED.search("\n".join(lines[start:end]))
        tolerance = int(stated[1]) / 100 if stated else TOLERANCE
        own = [block for block in blocks(PAGE) if start < block.line <= end]
        questions.append(Question(lines[start].removeprefix("## "), tolerance, own))
    return questions


QUESTIONS = read_questions()
ANSWERS = [
    pytest.param(block, question.tolerance, id=f"{question.title} {number}")
    for question in QUESTIONS
    for number, block in enumerate(
        [block for block in question.blocks if block.language == "python"], start=1
    )
]


@pytest.mark.parametrize(("block", "tolerance"), ANSWERS)
def test_prints_what_the_page_says(
    block: Block, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # what a block writes is not for the repository
    torch.manual_seed(20)  # a block that draws before it seeds prints something else than here
    printed = printed_by(PAGE, block, {"__name__": "__main__"})
    found = differences(block.output or "", printed, tolerance)
    assert not found, "\n".join(found)


def test_every_question_is_answered_by_a_number() -> None:
    assert len(QUESTIONS) >= 12
    for question in QUESTIONS:
        snippets = [block for block in question.blocks if block.language == "python"]
        assert snippets, question.title
        for block in snippets:
            assert block.output is not None, f"line {block.line} is followed by no output"
            assert NUMBER.search(block.output), f"the output of line {block.line} has no number"


def test_the_list_at_the_top_has_every_question_in_order() -> None:
    head = PAGE.read_text().partition("\n## ")[0]
    listed = re.findall(r"^- \[(.+)\]\(#(.+)\)$", head, re.MULTILINE)
    assert [title for title, _ in listed] == [question.title for question in QUESTIONS]
    assert {anchor for _, anchor in listed} <= anchors(PAGE)


def test_the_tolerances_of_the_page_are_those_of_the_test() -> None:
    head = " ".join(PAGE.read_text().partition("\n## ")[0].split())
    assert f"may differ by {TOLERANCE:.0%}".replace("%", " %") in head
    assert {question.tolerance for question in QUESTIONS} > {TOLERANCE}


def shifted(number: re.Match[str], by: float) -> str:
    """The number as it is printed, moved by a share of itself, or an integer by one."""
    if number["decimals"] is None:
        return str(int(number[0]) + 1)
    decimals, value = len(number["decimals"]), float(number[0])
    if number["exponent"] is not None:
        return f"{value * (1 + by):.{decimals}e}"
    return f"{value * (1 + by) + 3 * by * 10.0**-decimals / abs(by):.{decimals}f}"


@pytest.mark.parametrize(("block", "tolerance"), ANSWERS)
def test_a_wrong_number_on_the_page_is_noticed(block: Block, tolerance: float) -> None:
    printed = block.output
    assert printed is not None
    assert not differences(printed, printed, tolerance)
    for number in NUMBER.finditer(printed):
        for by in (2.5 * tolerance, -2.5 * tolerance):
            wrong = printed[: number.start()] + shifted(number, by) + printed[number.end() :]
            assert differences(wrong, printed, tolerance), f"{number[0]} as {shifted(number, by)}"
