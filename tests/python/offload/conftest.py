"""The experts of these tests, a file of them, and pieces smaller than they are."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from stored import made
from torchmoe.nn import Experts
from torchmoe.offload import files, writing
from torchmoe.offload.writing import write_store


@pytest.fixture
def experts() -> Experts:
    return made(bias=True)


@pytest.fixture
def path(tmp_path: Path, experts: Experts) -> Path:
    write_store(tmp_path / "a.safetensors", experts)
    return tmp_path / "a.safetensors"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert of many pieces, and much to write for the memory that may wait."""
    monkeypatch.setattr(files, "CHUNK", mmap.PAGESIZE)
    monkeypatch.setattr(writing, "UNWRITTEN", 1000)
