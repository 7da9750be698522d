"""The Python blocks of README and of the guides run as they stand, and print what they say.

A ```text block directly after a ```python block is what it prints. See `same_output` for how the
two are compared.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from pathlib import Path

import pytest

from documents import ROOT, Block, blocks
from torchmoe.nn.estimators import registry

DOCS = ROOT / "docs"
#: A page with a test of its own, test_questions.py.
ELSEWHERE = {DOCS / "questions.md"}
PAGES = [ROOT / "README.md", *sorted(set(DOCS.glob("*.md")) - ELSEWHERE)]
EXAMPLES = {page: [b for b in blocks(page) if b.language == "python"] for page in PAGES}
#: Pages whose blocks stand alone, to be copied one by one; those of the others continue each other.
STAND_ALONE = {DOCS / "gates.md"}

# Two processors round differently: a number may be off by 1 %, or by 2 in its last digit.
RELATIVE, LAST_DIGITS = 0.01, 2
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]\d+)?")
_SPENT = re.compile(r"\d+(?:\.\d+)? m?s\b")


def same_output(printed: str, shown: str) -> bool:
    """Whether a block printed what the page shows.

    Words and white space between them are compared as they are, but for spaces that fill up columns
    and the ends of lines; numbers within the tolerance; times as being times, whatever they are.
    """
    (words, numbers), (shown_words, shown_numbers) = _parts(printed), _parts(shown)
    return words == shown_words and all(map(_close, numbers, shown_numbers))


def _parts(text: str) -> tuple[list[str], list[str]]:
    """What stands between the numbers, and the numbers."""
    text = _SPENT.sub("TIME", text.strip())
    words = [" ".join(part.split()) for part in _NUMBER.split(text)]
    return words, _NUMBER.findall(text)


def _close(printed: str, shown: str) -> bool:
    if "." not in shown and "e" not in shown:
        return printed == shown  # a count
    mantissa, _, exponent = shown.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return math.isclose(
        float(printed), float(shown), rel_tol=RELATIVE, abs_tol=(LAST_DIGITS + 0.01) * unit
    )


def run(page: Path, block: Block, names: dict[str, object]) -> str:
    """What a block prints; its lines in a traceback are the page's."""
    printed = io.StringIO()
    code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return printed.getvalue()


@pytest.mark.parametrize("page", [p for p in PAGES if EXAMPLES[p]], ids=lambda page: page.name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what an example writes is not for the repository
    monkeypatch.setenv("COLUMNS", "88")
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))  # one adds a name
    names: dict[str, object] = {"__name__": "__main__"}
    for block in EXAMPLES[page]:
        if page in STAND_ALONE:
            names = {"__name__": "__main__"}
        printed = run(page, block, names)
        if block.output is not None:
            assert same_output(printed, block.output), f"{page}:{block.line} printed\n{printed}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_output_belongs_to_an_example(page: Path) -> None:
    """A text block is an output, so that no page shows one which nothing compares."""
    found = blocks(page)
    outputs = sum(b.output is not None for b in found if b.language == "python")
    assert outputs == sum(b.language == "text" for b in found)


def test_there_are_examples_to_run() -> None:
    guides = "quick_start balance capacity estimators gates watching testing_gradients certificates"
    for name in (*guides.split(), "ops", "custom_parts", "cuda", "speed", "installing"):
        assert EXAMPLES[DOCS / f"{name}.md"], name
    assert sum(b.output is not None for found in EXAMPLES.values() for b in found) >= 30


@pytest.mark.parametrize(
    ("printed", "shown", "same"),
    [
        ("loss 0.501", "loss 0.502", True),
        ("loss 0.501", "loss 0.51", True),
        ("loss 0.501", "loss 0.521", False),
        ("loss 0.501", "gain 0.501", False),
        ("[31, 33]", "[31, 33]", True),
        ("[31, 33]", "[31, 32]", False),
        ("4,844,421,120", "4,844,421,121", False),
        ("-8.2e-07", "-8.1e-07", True),
        ("-8.2e-07", "8.2e-07", False),
        ("-8.2e-07", "-8.2e-06", False),
        ("broken (2.4 s)", "broken (31.2 s)", True),
        ("broken (2.4 s)", "broken (2.4 m)", False),
        ("a   b 1.0\n", "a b 1.0", True),
        ("1.0 2.0", "1.0", False),
    ],
)
def test_outputs_are_compared(printed: str, shown: str, same: bool) -> None:
    assert same_output(printed, shown) == same
