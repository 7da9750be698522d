"""A file that is opened, read, changed and closed."""

from __future__ import annotations

import errno
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stored import BYTES, INNER, E, H, check_reads, made, room, tensors
from torchmoe.nn import Experts
from torchmoe.offload import store as reading
from torchmoe.offload.store import ExpertStore
from torchmoe.offload.writing import write_store

# ---- what is refused when a file is opened


def flipped(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_folder_and_a_pipe(tmp_path: Path, experts: Experts) -> None:
    with pytest.raises(ValueError, match=f"^offload: store must be a file, got {tmp_path}$"):
        ExpertStore.open(tmp_path, experts)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"^offload: store must be a file, got .*pipe$"):
        ExpertStore.open(tmp_path / "pipe", experts)


def test_no_file(tmp_path: Path, experts: Experts) -> None:
    message = rf"offload: cannot open the store: No such file or directory: '{tmp_path}/a'"
    with pytest.raises(FileNotFoundError, match=message):
        ExpertStore.open(tmp_path / "a", experts)


@pytest.mark.parametrize("length", [-1, 1, -4096])
def test_a_file_of_another_length(path: Path, experts: Experts, length: int) -> None:
    size = path.stat().st_size
    os.truncate(path, size + length)
    message = f"^offload: store must have {size} bytes, as its header says, got {path} of"
    with pytest.raises(ValueError, match=message):
        ExpertStore.open(path, experts)


@pytest.mark.parametrize("place", [-1, -BYTES, -BYTES // 2])
def test_a_bit_of_the_data_is_another(path: Path, experts: Experts, place: int) -> None:
    flipped(path, place)
    with pytest.raises(ValueError, match=f"^offload: store must hold the data .*, got {path} with"):
        ExpertStore.open(path, experts)


def test_a_refused_file_is_closed(path: Path, experts: Experts) -> None:
    flipped(path, -1)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(ValueError, match="must hold the data"):
            ExpertStore.open(path, experts)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


# ---- a file that changes while it is open


def wait_for_another_time(path: Path, opened: int) -> None:
    """A file system may give two writes that follow one another the same time."""
    while path.stat().st_ctime_ns == opened:
        with path.open("r+b") as file:
            first = file.read(1)
            file.seek(0)
            file.write(first)


def rewritten(path: Path) -> None:
    before = path.stat().st_ctime_ns
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")
    wait_for_another_time(path, before)


def rewritten_secretly(path: Path) -> None:
    then = path.stat()
    rewritten(path)
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert path.stat().st_mtime_ns == then.st_mtime_ns


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "shortened": (
        lambda path: os.truncate(path, path.stat().st_size - 1),
        r"of \d+ bytes, got {path} of \d+ bytes",
    ),
    "emptied": (lambda path: os.truncate(path, 0), "of .* bytes, got {path} of 0 bytes"),
    "longer": (
        lambda path: os.truncate(path, path.stat().st_size + 1),
        r"of \d+ bytes, got {path} of \d+ bytes",
    ),
    "rewritten": (rewritten, "got {path}, which was written to since"),
    "rewritten secretly": (rewritten_secretly, "got {path}, which was written to since"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=list(CHANGES))
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_file_that_has_changed_is_not_read(
    path: Path,
    experts: Experts,
    change: Callable[[Path], object],
    message: str,
    when: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = ExpertStore.open(path, experts)
    if when == "before":
        change(path)
    else:
        preadv, left = os.preadv, [2]

        def changing(*arguments: Any) -> int:
            left[0] -= 1
            if left[0] == 0:
                change(path)
            return preadv(*arguments)

        monkeypatch.setattr(os, "preadv", changing)
    expected = "^offload: store must stay as it was opened, "
    with pytest.raises(RuntimeError, match=f"{expected}.*{message.format(path=path)}$"):
        store.read(E - 1, room(experts))


def test_a_file_that_changes_while_it_is_opened(
    path: Path, experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = reading.sha256_of

    def changing(*arguments: Any) -> str:
        found = sha256(*arguments)
        rewritten(path)
        return found

    monkeypatch.setattr(reading, "sha256_of", changing)
    with pytest.raises(RuntimeError, match="must stay as it was opened"):
        ExpertStore.open(path, experts)


@pytest.mark.parametrize("change", ["deleted", "replaced", "linked"])
def test_a_file_that_loses_its_name_is_read_on(path: Path, experts: Experts, change: str) -> None:
    store = ExpertStore.open(path, experts)
    if change == "deleted":
        path.unlink()
    elif change == "linked":
        os.link(path, path.with_name("b"))
    else:
        write_store(path, made(bias=True))
    check_reads(store, experts)


def test_an_error_of_the_disk_names_the_file(
    path: Path, experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ExpertStore.open(path, experts)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", broken)
        message = f"offload: cannot read the store: Input/output error: '{path}'"
        with pytest.raises(OSError, match=message) as caught:
            store.read(0, room(experts))
        assert caught.value.errno == errno.EIO
    check_reads(store, experts)


# ---- closing, threads, processes


def test_a_closed_file_is_not_read(path: Path, experts: Experts) -> None:
    store = ExpertStore.open(path, experts)
    before = len(os.listdir("/proc/self/fd"))
    store.close()
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1
    with pytest.raises(ValueError, match=rf"^offload: store must be open, got {path} after close"):
        store.read(0, room(experts))


def test_a_file_is_closed_with_what_reads_it(path: Path, experts: Experts) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    stores = [ExpertStore.open(path, experts) for _ in range(3)]
    assert len(os.listdir("/proc/self/fd")) == before + 3
    stores.clear()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_closing_waits_for_those_who_read(
    path: Path, experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of a closed file may be another file's at once."""
    store = ExpertStore.open(path, experts)
    preadv, other = os.preadv, path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    opened: list[int] = []

    def closing(*arguments: Any) -> int:
        store.close()
        opened.append(os.open(other, os.O_RDONLY))
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", closing)
    into = room(experts)
    store.read(1, into)
    for number in opened:
        os.close(number)
    for name, tensor in tensors(experts).items():
        assert torch.equal(into[name], tensor[1])


@pytest.mark.usefixtures("small_pieces")
def test_many_threads_read_at_once(path: Path, experts: Experts) -> None:
    store = ExpertStore.open(path, experts)
    wrong: list[BaseException] = []

    def read() -> None:
        try:
            for _ in range(20):
                check_reads(store, experts)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_process_reads_the_same_file(path: Path, experts: Experts) -> None:
    store = ExpertStore.open(path, experts)
    child = os.fork()
    if child == 0:
        try:
            check_reads(store, experts)
            store.close()
        except BaseException:
            os._exit(1)
        os._exit(0)
    check_reads(store, experts)
    assert os.waitpid(child, 0)[1] == 0
    check_reads(store, experts)


# ---- arguments


def test_what_an_expert_is_read_into(path: Path, experts: Experts) -> None:
    store = ExpertStore.open(path, experts)
    for expert in (-1, E):
        with pytest.raises(IndexError, match=rf"expert must be in \[0, {E}\), got {expert} of"):
            store.read(expert, room(experts))
    with pytest.raises(RuntimeError, match=r"into must have gate_up_proj, .*, got down_proj$"):
        store.read(0, {"down_proj": room(experts)["down_proj"]})
    for tensor in (
        torch.empty(INNER, H),
        torch.empty(INNER, H).T,
        torch.empty(H, INNER, dtype=torch.float64),
        torch.empty(H, INNER, device="meta"),
    ):
        with pytest.raises(RuntimeError, match=r"into must have down_proj as a contiguous CPU"):
            store.read(0, room(experts) | {"down_proj": tensor})
