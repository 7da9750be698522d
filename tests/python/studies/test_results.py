"""What a study's page says: its protocol, its command, and the origin of its numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from documents import ROOT, code_spans, tables

STUDIES = sorted(path.parent for path in (ROOT / "studies").glob("*/__main__.py"))
every_study = pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
MAKEFILE = (ROOT / "Makefile").read_text()


def test_there_are_studies() -> None:
    assert len(STUDIES) >= 5


@every_study
def test_the_page_says_how_and_what(study: Path) -> None:
    text = (study / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert re.findall(r"^## (.+)$", text, flags=re.M) == ["Protocol", "Result"]
    result = text.partition("\n## Result\n")[2]
    assert re.search(r"\brevision [0-9a-f]{7,12}\b", result)
    assert "torch 2" in result


@every_study
def test_the_page_links_to_what_its_command_wrote(study: Path) -> None:
    written = sorted(study.glob("result*.md"))
    assert written
    text = (study / "README.md").read_text()
    for file in written:
        assert f"({file.name})" in text


@pytest.mark.parametrize("written", sorted((ROOT / "studies").glob("*/result*.md")), ids=str)
def test_what_a_command_wrote_is_of_a_clean_tree(written: Path) -> None:
    lines = written.read_text().splitlines()
    assert len(lines) <= 200
    about = re.fullmatch(
        r"Written by `python -m studies\.(\w+).*` at revision ([0-9a-f]{12}), "
        r"the library built from ([0-9a-f]{12}), with torch .+ and Python .+ on \d+ cores of .+\.",
        lines[0],
    )
    assert about is not None
    assert about[1] == written.parent.name
    assert about[2] == about[3]
    assert about[2] in (written.parent / "README.md").read_text()


@every_study
def test_the_page_has_the_command_and_a_table(study: Path) -> None:
    page = study / "README.md"
    (target,) = re.findall(rf"^([a-z-]+): .*\n\t.*-m studies\.{study.name} ", MAKEFILE, flags=re.M)
    assert f"    make {target}" in page.read_text()
    assert tables(page)


def test_the_list_of_studies_has_them_all() -> None:
    page = ROOT / "studies" / "README.md"
    rows = tables(page)[0][1:]
    assert {re.sub(r"\[(.+)\].*", r"\1", row[0]) for row in rows} == {s.name for s in STUDIES}
    assert {span for span in code_spans(page) if span.startswith("make ")} > {
        row[2].strip("`") for row in rows
    }
