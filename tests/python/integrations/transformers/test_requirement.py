"""What is said where transformers is missing or too old."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import torchmoe

FILE = Path(torchmoe.__file__).parent / "integrations" / "transformers" / "_requirement.py"


@pytest.fixture
def requirement() -> ModuleType:
    """The file by itself: its package imports transformers."""
    pytest.importorskip("packaging", reason="needs packaging")
    spec = importlib.util.spec_from_file_location("requirement", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", ["5.23.9", "4.57.1", "5.9"])
def test_too_old(requirement: ModuleType, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(ImportError, match=rf"must be 5\.24 or later, got {version}; .*\[transf"):
        requirement.check()


def test_missing(requirement: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ImportError, match=r"got none; pip install 'torchmoe\[transformers\]'"):
        requirement.check()


@pytest.mark.parametrize("version", ["5.24", "5.24.0", "5.25.0.dev0", "5.24.0.dev0", "6.0"])
def test_new_enough(requirement: ModuleType, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    requirement.check()
