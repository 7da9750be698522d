"""Writes docs/mutants.md: PYTHONPATH=tests/python python -m certify.table > docs/mutants.md."""

from __future__ import annotations

import re
import sys
from collections import defaultdict

from certify.mutants.registry import Mutant, all_mutants

HEAD = """\
# Bugs that the laws are tested with

Each entry is a small layer in `tests/python/certify/mutants/` with one bug of a kind that somebody
reported about a real layer. It says what is wrong, what the report says, and where it stands.
`make certificates` asks the laws of a [certificate](certificates.md) about each.

Reports were read as excerpts, and some are a reviewer's remark that nobody confirmed. "Similar"
marks reports of the same kind of bug. A star marks lawful layers of another formula or coefficient,
which only a reference tells from the right one.
"""
_REPORT = re.compile(
    r"(?P<kind>kind reported.*, e\.g\. )?(?P<url>https://github\.com/"
    r"(?P<repository>[^/]+/[^/]+)/(?:issues|pull)/(?P<number>\d+))"
)


def _source(mutant: Mutant) -> str:
    """Where it was reported, as a link that says so."""
    report = _REPORT.fullmatch(mutant.source)
    assert report is not None, f"{mutant.name}: no link to a report in {mutant.source}"
    similar = "similar: " if report["kind"] else ""
    return f"({similar}[{report['repository']}#{report['number']}]({report['url']}))"


def _entry(mutant: Mutant) -> str:
    star = " \\*" if mutant.needs_reference else ""
    return f"- `{mutant.name}`{star}: {mutant.kind}. *Report:* {mutant.report} {_source(mutant)}"


def _heading(mutant: Mutant) -> str:
    """What the file that it stands in says of itself."""
    title = sys.modules[type(mutant.make(0)).__module__].__doc__
    assert title is not None
    return title.splitlines()[0].removesuffix(".")


def table() -> str:
    """The page."""
    sections: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in all_mutants().values():
        sections[_heading(mutant)].append(mutant)
    pages = [HEAD]
    for heading, mutants in sections.items():
        pages += [f"## {heading}\n", *map(_entry, mutants), ""]
    return "\n".join(pages).rstrip() + "\n"


if __name__ == "__main__":
    print(table(), end="")
