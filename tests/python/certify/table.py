"""Writes docs/mutants.md: PYTHONPATH=tests/python python -m certify.table > docs/mutants.md."""

from __future__ import annotations

from certify.mutants.registry import all_mutants

HEAD = """\
# Bugs that the laws are tested with

Each row is a small layer in `tests/python/certify/mutants/` that has one bug of a kind that
somebody reported about a real layer; its source says where. Reports were read as excerpts, some
are a reviewer's remark that nobody confirmed, and "kind reported" marks those that are only
similar. `*` marks lawful layers of another formula or coefficient, which only a reference tells
from the right one.

| name | kind | source | what was reported |
|---|---|---|---|"""


def table() -> str:
    """The page."""
    rows = [HEAD]
    for mutant in all_mutants().values():
        star = " *" if mutant.needs_reference else ""
        cells = (f"`{mutant.name}`{star}", mutant.kind, mutant.source, mutant.report)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
