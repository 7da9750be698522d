"""The Python examples of the README and of docs/ run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Text -> how many examples it has at least.
CERTIFICATES = ROOT / "docs" / "certificates.md"
TEXTS = {ROOT / "README.md": 11, ROOT / "docs" / "gating.md": 9, CERTIFICATES: 4}
EXAMPLES = {
    f"{path.name}-{number}": code
    for path in TEXTS
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    )
}
#: Texts whose examples continue one another.
STORIES = (CERTIFICATES,)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_there_are_examples_to_run(path: Path) -> None:
    found = [name for name in EXAMPLES if name.startswith(path.name)]
    assert len(found) == path.read_text().count("```python") >= TEXTS[path]


def _in_stories(name: str) -> bool:
    return any(name.startswith(path.name) for path in STORIES)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if not _in_stories(name)])
def test_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what an example writes is not for the repository
    exec(compile(EXAMPLES[name], name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.name)
def test_story_runs(path: Path) -> None:
    names = {"__name__": "__main__"}
    for name, code in EXAMPLES.items():
        if name.startswith(path.name):
            exec(compile(code, name, "exec"), names)
