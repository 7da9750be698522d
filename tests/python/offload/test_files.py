"""What the system is asked for while a file is written and read, and what it keeps."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from page_cache import cached_bytes
from stored import check_reads, one_of
from torchmoe.nn import Experts
from torchmoe.offload import files, writing
from torchmoe.offload.store import ExpertStore
from torchmoe.offload.writing import write_store


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("streamed", [False, True])
def test_an_expert_of_many_pieces(tmp_path: Path, streamed: bool) -> None:
    experts = Experts(100, 50, 3, dtype=torch.bfloat16).requires_grad_(False)
    if streamed:
        meta = Experts(100, 50, 3, dtype=torch.bfloat16, device="meta")
        write_store(tmp_path / "a", meta, one_of(experts))
    else:
        write_store(tmp_path / "a", experts)
    store = ExpertStore.open(tmp_path / "a", experts)
    assert store.expert_bytes > store.window_bytes == 2 * mmap.PAGESIZE
    check_reads(store, experts)


def test_a_system_that_gives_less_than_it_is_asked_for(
    tmp_path: Path, experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda n, b, at: preadv(n, [b[0][:101]], at))
    monkeypatch.setattr(os, "pwrite", lambda n, b, at: pwrite(n, b[:103], at))
    write_store(tmp_path / "a", experts)
    check_reads(ExpertStore.open(tmp_path / "a", experts), experts)


def test_a_system_without_advice(
    tmp_path: Path, experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.delattr(os, "posix_fallocate")
    write_store(tmp_path / "a", experts)
    check_reads(ExpertStore.open(tmp_path / "a", experts), experts)


def test_a_file_system_that_supports_nothing(
    tmp_path: Path, experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fadvise", unsupported)
    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    monkeypatch.setattr(writing.fcntl, "flock", unsupported)
    fsync = os.fsync

    def fsync_of_files(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            unsupported()
        fsync(number)

    monkeypatch.setattr(os, "fsync", fsync_of_files)
    write_store(tmp_path / "a", experts)
    check_reads(ExpertStore.open(tmp_path / "a", experts), experts)
    # Whether another process writes cannot be told there, so that nothing of its is removed.
    (tmp_path / "a.unfinished").write_bytes(b"half")
    with pytest.raises(BlockingIOError, match=r"may be writing .*a\.unfinished"):
        write_store(tmp_path / "a", experts)
    assert (tmp_path / "a.unfinished").read_bytes() == b"half"


# ---- what stays in memory


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """A folder whose files are dropped from the cache when that is asked for."""
    file = tmp_path / "probe"
    file.write_bytes(bytes(100_000))
    with file.open("rb") as opened:
        assert cached_bytes(file) > 0
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_bytes(file) > 0:
        pytest.skip("the temporary folder is in memory")
    return tmp_path


@pytest.mark.parametrize("streamed", [False, True])
def test_the_page_cache_holds_no_more_than_the_window(
    cached: Path, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK", 4 * mmap.PAGESIZE)
    monkeypatch.setattr(writing, "UNWRITTEN", 16 * mmap.PAGESIZE)
    experts = Experts(251, 131, 6).requires_grad_(False)
    seen: list[int] = []

    def watched(call: Callable[..., int], path: Path) -> Callable[..., int]:
        def run(*arguments: Any) -> int:
            result = call(*arguments)
            seen.append(cached_bytes(path))
            return result

        return run

    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", watched(pwrite, cached / "a.unfinished"))
    if streamed:
        write_store(cached / "a", Experts(251, 131, 6, device="meta"), one_of(experts))
    else:
        write_store(cached / "a", experts)
    assert 0 < max(seen) <= 2 * writing.UNWRITTEN
    assert cached_bytes(cached / "a") == 0

    seen.clear()
    monkeypatch.setattr(os, "preadv", watched(preadv, cached / "a"))
    store = ExpertStore.open(cached / "a", experts)
    # The header's page is one more while the file is opened.
    assert 0 < max(seen) <= store.window_bytes + mmap.PAGESIZE
    assert cached_bytes(cached / "a") == 0

    seen.clear()
    check_reads(store, experts)
    assert 0 < max(seen) <= store.window_bytes
    assert cached_bytes(cached / "a") == 0
