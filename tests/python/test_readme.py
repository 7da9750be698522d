"""The Python examples of the README and of docs/ run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = {
    f"{path.name}-{number}": code
    for path in (ROOT / "README.md", ROOT / "docs" / "gating.md")
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    )
}


def test_there_are_examples_to_run() -> None:
    assert len(EXAMPLES) == 8 + 9


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what an example writes is not for the repository
    exec(compile(EXAMPLES[name], name, "exec"), {"__name__": "__main__"})
