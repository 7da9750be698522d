"""ARCHITECTURE.md names every file of the layer's room, and none that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_files_of_the_layer() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    room = text[text.rindex("\n      nn/ ") : text.index("\n      monitor/ ")]
    named = set(re.findall(r"\b_?\w+\.py\b", room))
    folder = ROOT / "python" / "torchmoe" / "nn"
    inside = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    shared = {
        path.name
        for name in ("estimators", "routers")
        for path in (folder / name).glob("_[!_]*.py")
    }
    shared |= {"estimator.py", "registry.py", "context_router.py"}
    assert named == inside | shared


def test_the_python_files_that_the_text_names() -> None:
    """By their whole paths, or as they lie in the package."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for name in re.findall(r"`([\w/]+/\w+\.py)`", text):
        assert any((base / name).is_file() for base in (ROOT, ROOT / "python/torchmoe")), name
