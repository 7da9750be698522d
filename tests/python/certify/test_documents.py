"""The pages say what the code says."""

from __future__ import annotations

from pathlib import Path

from certify.table import table
from torchmoe.testing import known_laws

DOCS = Path(__file__).parents[3] / "docs"


def test_the_table_of_mutants() -> None:
    assert (DOCS / "mutants.md").read_text() == table()


def test_the_table_of_laws() -> None:
    page = (DOCS / "certificates.md").read_text()
    for law in known_laws():
        assert f"| `{law.name}` | {law.formula.replace('|', '&#124;')} | {law.means} |" in page
