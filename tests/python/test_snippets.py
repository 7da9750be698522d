"""The Python blocks of README and of the guides run as they stand, and print what they say.

A ```text block directly after a ```python block is what it prints.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from documents import ROOT, blocks, differences, printed_by
from torchmoe.nn.estimators import registry

DOCS = ROOT / "docs"
#: A page with a test of its own, test_questions.py.
ELSEWHERE = {DOCS / "questions.md"}
PAGES = [ROOT / "README.md", *sorted(set(DOCS.glob("*.md")) - ELSEWHERE)]
EXAMPLES = {page: [b for b in blocks(page) if b.language == "python"] for page in PAGES}
#: Pages whose blocks stand alone, to be copied one by one; those of the others continue each other.
STAND_ALONE = {DOCS / "gates.md"}
#: Pages about another library.
NEEDS = {DOCS / "transformers.md": "transformers"}

# Two processors round differently: a number may be off by 1 %, or by 2 in its last digit.
TOLERANCE, LAST_DIGITS = 0.01, 2


@pytest.mark.parametrize("page", [p for p in PAGES if EXAMPLES[p]], ids=lambda page: page.name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page in NEEDS:
        pytest.importorskip(NEEDS[page], reason=f"needs {NEEDS[page]}")
    monkeypatch.chdir(tmp_path)  # what an example writes is not for the repository
    monkeypatch.setenv("COLUMNS", "88")
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))  # one adds a name
    names: dict[str, object] = {"__name__": "__main__"}
    for block in EXAMPLES[page]:
        if page in STAND_ALONE:
            names = {"__name__": "__main__"}
        printed = printed_by(page, block, names)
        if block.output is not None:
            found = differences(block.output, printed, TOLERANCE, LAST_DIGITS)
            assert not found, "\n".join((f"{page}:{block.line}", *found))


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
