"""The file of experts: what is written and refused, and what a failing disk or process leaves."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import mmap
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from page_cache import cached_bytes
from torchmoe.nn import Experts
from torchmoe.offload import files, writing
from torchmoe.offload import store as reading
from torchmoe.offload.store import ExpertStore
from torchmoe.offload.writing import write_store

H, INNER, E = 24, 20, 5


def made(device: str = "cpu", **options: Any) -> Experts:
    return Experts(H, INNER, E, device=device, **options).requires_grad_(False)


def tensors(experts: Experts) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in experts.named_parameters()}


def one_of(experts: Experts) -> Callable[[int], dict[str, Tensor]]:
    return lambda expert: {name: tensor[expert] for name, tensor in tensors(experts).items()}


def room(experts: Experts) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor[0], 7.0) for name, tensor in tensors(experts).items()}


def check_reads(store: ExpertStore, experts: Experts) -> None:
    into = room(experts)
    for expert in reversed(range(experts.num_experts)):
        assert store.read(expert, into) == store.expert_bytes
        for name, tensor in tensors(experts).items():
            assert torch.equal(into[name], tensor[expert])


@pytest.fixture
def experts() -> Experts:
    return made(bias=True)


@pytest.fixture
def path(tmp_path: Path, experts: Experts) -> Path:
    write_store(tmp_path / "a.safetensors", experts)
    return tmp_path / "a.safetensors"


KINDS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"activation": "relu", "bias": True},
    {"dtype": torch.bfloat16, "activation": "gelu"},
    {"dtype": torch.float16, "bias": True},
    {"dtype": torch.float64},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_what_is_written_is_read(tmp_path: Path, options: dict[str, Any]) -> None:
    experts = made(**options)
    write_store(tmp_path / "a", experts)
    store = ExpertStore.open(tmp_path / "a", made("meta", **options))
    check_reads(store, experts)
    total = sum(tensor.nbytes for tensor in tensors(experts).values())
    assert (store.num_experts, store.num_bytes) == (E, total)
    assert store.expert_bytes * E == total
    assert store.path == str(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_the_safetensors_library_reads_the_file(tmp_path: Path, options: dict[str, Any]) -> None:
    experts = made(**options)
    write_store(tmp_path / "a", experts)
    with safe_open(tmp_path / "a", "pt") as file:
        assert set(file.keys()) == set(tensors(experts))
        for name, tensor in tensors(experts).items():
            assert torch.equal(file.get_tensor(name), tensor)
        metadata = file.metadata()
    content = (tmp_path / "a").read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    assert begin % mmap.PAGESIZE == 0
    assert metadata["activation"] == experts.activation
    assert metadata["sha256"] == hashlib.sha256(content[begin:]).hexdigest()


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_an_expert_at_a_time_gives_the_same_file(tmp_path: Path, options: dict[str, Any]) -> None:
    experts = made(**options)
    asked = []

    def expert(index: int) -> dict[str, Tensor]:
        asked.append(index)
        # In another order of names, and not contiguous.
        slices = reversed(one_of(experts)(index).items())
        return {name: torch.stack((tensor, tensor), -1)[..., 0] for name, tensor in slices}

    write_store(tmp_path / "a", experts)
    write_store(tmp_path / "b", made("meta", **options), expert)
    assert asked == list(range(E))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_strides_do_not_matter(tmp_path: Path, experts: Experts) -> None:
    other = made(bias=True)
    for name, tensor in tensors(experts).items():
        turned = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        assert not turned.is_contiguous()
        setattr(other, name, torch.nn.Parameter(turned, requires_grad=False))
    write_store(tmp_path / "a", experts)
    write_store(tmp_path / "b", other)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert of many pieces, and much to write for the memory that may wait."""
    monkeypatch.setattr(files, "CHUNK", mmap.PAGESIZE)
    monkeypatch.setattr(writing, "UNWRITTEN", 1000)


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


# ---- what is refused when a file is opened


def changed_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode().ljust(end - 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def flipped(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def swap(header: dict[str, Any]) -> None:
    """Two tensors of one shape would be exchanged; here they overlap instead."""
    header["down_proj"]["data_offsets"] = [
        offset - 4 for offset in header["down_proj"]["data_offsets"]
    ]


BYTES = 4 * E * (2 * INNER * H + 2 * INNER + H * INNER + H)
BAD_HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no metadata": (
        lambda header: header.pop("__metadata__"),
        "must be written by offload or write_store, got {path}, whose header does not say so",
    ),
    "metadata of another kind": (
        lambda header: header.update(__metadata__="x"),
        "must be written by offload or write_store, got {path}, whose header does not say so",
    ),
    "another version": (
        lambda header: header["__metadata__"].update({"torchmoe.offload": "2"}),
        "must be of version 1, got {path} of version 2",
    ),
    "another activation": (
        lambda header: header["__metadata__"].update(activation="geglu"),
        "must be of experts with the activation swiglu, got {path} with geglu",
    ),
    "no SHA-256": (
        lambda header: header["__metadata__"].pop("sha256"),
        "must hold the data whose SHA-256 its header names, None, got {path} with [0-9a-f]{{64}}",
    ),
    "a tensor less": (
        lambda header: header.pop("down_proj_bias"),
        "must have the tensors gate_up_proj, gate_up_proj_bias, down_proj, down_proj_bias, "
        "got {path} with down_proj, gate_up_proj, gate_up_proj_bias",
    ),
    "an unknown tensor": (
        lambda header: header.update(x=header["down_proj"]),
        "must have the tensors gate_up_proj, .*, got {path} with .*, x",
    ),
    "another dtype": (
        lambda header: header["down_proj"].update(dtype="I32"),
        "must have down_proj of dtype F32, got {path} with I32",
    ),
    "another shape": (
        lambda header: header["down_proj"].update(shape=[E, INNER, H]),
        rf"must have down_proj of shape \[{E}, {H}, {INNER}\], got {{path}} with "
        rf"\[{E}, {INNER}, {H}\]",
    ),
    "no entry": (
        lambda header: header.update(down_proj=3),
        "must have down_proj of dtype F32, got {path} with None",
    ),
    "no offsets": (
        lambda header: header["down_proj"].pop("data_offsets"),
        f"must have {4 * E * H * INNER} bytes of down_proj, got {{path}} with the offsets None",
    ),
    "offsets of text": (
        lambda header: header["down_proj"].update(data_offsets=["0", "1"]),
        r"must have \d+ bytes of down_proj, got {path} with the offsets \['0', '1'\]",
    ),
    "too few bytes": (
        lambda header: header["down_proj"].update(data_offsets=[0, 8]),
        r"must have \d+ bytes of down_proj, got {path} with the offsets \[0, 8\]",
    ),
    "an overlap": (
        swap,
        r"must have tensors side by side, got {path} with down_proj at \d+ of its data "
        r"instead of \d+",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_HEADERS.values(), ids=list(BAD_HEADERS))
def test_a_header_that_does_not_fit(
    path: Path, experts: Experts, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    changed_header(path, change)
    expected = "offload: store " + message.format(path=re.escape(str(path)))
    with pytest.raises(ValueError, match=f"^{expected}$"):
        ExpertStore.open(path, experts)


def test_a_header_with_its_tensors_in_another_order_is_as_good(
    tmp_path: Path, path: Path, experts: Experts
) -> None:
    changed_header(path, lambda header: header.update(gate_up_proj=header.pop("gate_up_proj")))
    check_reads(ExpertStore.open(path, experts), experts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": False}, "must have the tensors gate_up_proj, down_proj, got"),
        ({"activation": "relu"}, "must be of experts with the activation relu, got .* swiglu"),
        ({"activation": "reglu"}, "must be of experts with the activation reglu, got .* swiglu"),
        ({"dtype": torch.bfloat16}, "must have gate_up_proj of dtype BF16, got .* with F32"),
    ],
    ids=str,
)
def test_other_experts(path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^offload: store {message}"):
        ExpertStore.open(path, made("meta", **({"bias": True} | options)))


def test_other_sizes(path: Path) -> None:
    with pytest.raises(ValueError, match=r"must have gate_up_proj of shape \[6, 40, 24\], got"):
        ExpertStore.open(path, Experts(H, INNER, E + 1, bias=True, device="meta"))


NO_STORES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "of 0 bytes"),
    "short": (b"abc", "of 3 bytes"),
    "text": (b"what a fine day it is\n", r"of 22 bytes with a header of \d+ bytes"),
    "no JSON": (b"\2\0\0\0\0\0\0\0{x", "whose header is not JSON"),
    "not UTF-8": (b"\2\0\0\0\0\0\0\0\xff\xfe", "whose header is not JSON"),
    "no object": (b"\2\0\0\0\0\0\0\0[]", "whose header is not a JSON object"),
    "deep": ((200_000).to_bytes(8, "little") + 200_000 * b"[", "whose header is not JSON"),
}


@pytest.mark.parametrize(("content", "message"), NO_STORES.values(), ids=list(NO_STORES))
def test_a_file_of_another_kind(
    tmp_path: Path, experts: Experts, content: bytes, message: str
) -> None:
    file = tmp_path / "a"
    file.write_bytes(content)
    expected = rf"^offload: store must be a file of safetensors, got {file},? {message}$"
    with pytest.raises(ValueError, match=expected):
        ExpertStore.open(file, experts)


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


OTHER = r"down_proj as a tensor of torch.float32 of shape \[24, 20\], got "
GIVEN: dict[str, tuple[Any, type[Exception], str]] = {
    "nothing": (None, TypeError, "a mapping of names to tensors, got None$"),
    "a name less": (
        {"down_proj": torch.ones(H, INNER)},
        RuntimeError,
        "gate_up_proj, down_proj, got down_proj$",
    ),
    "another shape": (torch.ones(INNER, H), RuntimeError, OTHER + "a tensor"),
    "another dtype": (torch.ones(H, INNER).double(), RuntimeError, OTHER + "a tensor"),
    "no values": (torch.ones(H, INNER, device="meta"), RuntimeError, OTHER + "a tensor"),
    "no tensor": (3, RuntimeError, OTHER + "3$"),
}


@pytest.mark.parametrize(("given", "kind", "message"), GIVEN.values(), ids=list(GIVEN))
def test_what_an_expert_may_be(
    tmp_path: Path, given: Any, kind: type[Exception], message: str
) -> None:
    whole = {"gate_up_proj": torch.ones(2 * INNER, H), "down_proj": given}
    result = given if given is None or isinstance(given, dict) else whole
    with pytest.raises(kind, match=f"^write_store: expert must return {message}"):
        write_store(tmp_path / "a", made("meta"), lambda expert: result)
    assert os.listdir(tmp_path) == []


def test_experts_with_and_without_values(tmp_path: Path, experts: Experts) -> None:
    with pytest.raises(ValueError, match="expert must be given for experts on the meta device"):
        write_store(tmp_path / "a", made("meta"))
    with pytest.raises(ValueError, match="expert must be None for experts that hold their values"):
        write_store(tmp_path / "a", experts, one_of(experts))
    assert os.listdir(tmp_path) == []


def test_dtypes_that_cannot_be_stored(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"experts must be of float32, .*, got gate_up_proj of"):
        write_store(tmp_path / "a", made().to(torch.float8_e5m2))
    mixed = made(bias=True)
    mixed.gate_up_proj_bias = torch.nn.Parameter(mixed.gate_up_proj_bias.double())
    with pytest.raises(RuntimeError, match="experts must be of one dtype, got gate_up_proj_bias"):
        write_store(tmp_path / "a", mixed)
    assert os.listdir(tmp_path) == []


# ---- a disk that is full, a process that is stopped


@pytest.fixture
def short_files() -> Iterator[None]:
    """No file of this process may be longer than half the experts."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES // 2, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("path", "short_files")
@pytest.mark.parametrize("reserved", [True, False])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_file_that_finds_no_room(
    path: Path, experts: Experts, reserved: bool, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()
    if not reserved:
        monkeypatch.delattr(os, "posix_fallocate")
    asked = []

    def expert(index: int) -> dict[str, Tensor]:
        asked.append(index)
        return one_of(experts)(index)

    message = f"write_store: cannot write the store: File too large: '{path}'"
    arguments = (made("meta", bias=True), expert) if streamed else (experts,)
    with pytest.raises(OSError, match=message) as caught:
        write_store(path, *arguments)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    if reserved:
        assert asked == []  # before the work


STEPS = ["pwrite", "fsync", "replace"]


@pytest.mark.parametrize("step", STEPS)
def test_a_disk_that_is_full_at_any_step(
    path: Path, experts: Experts, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    message = f"write_store: cannot write the store: No space left on device: '{path}'"
    with pytest.raises(OSError, match=message):
        write_store(path, made(bias=True))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_folder_that_cannot_be_made_sure_of(
    path: Path, experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file is in its place then, and the error says what is in doubt."""
    fsync = os.fsync

    def broken(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(number)

    monkeypatch.setattr(os, "fsync", broken)
    other = made(bias=True)
    message = f"write_store: cannot write the store's folder: Input/output error: '{path}'"
    with pytest.raises(OSError, match=message):
        write_store(path, other)
    assert os.listdir(path.parent) == [path.name]
    check_reads(ExpertStore.open(path, other), other)


def test_a_folder_that_is_not_there(tmp_path: Path, experts: Experts) -> None:
    message = f"write_store: cannot write the store: No such file or directory: '{tmp_path}/b/a'"
    with pytest.raises(FileNotFoundError, match=message):
        write_store(tmp_path / "b" / "a", experts)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError("no more")])
def test_an_expert_that_fails(path: Path, experts: Experts, stop: Any) -> None:
    before = path.read_bytes()

    def expert(index: int) -> dict[str, Tensor]:
        if index == 3:
            raise stop
        return one_of(experts)(index)

    with pytest.raises(stop if isinstance(stop, type) else type(stop)):
        write_store(path, made("meta", bias=True), expert)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_two_that_write_one_file(path: Path, experts: Experts) -> None:
    def expert(index: int) -> dict[str, Tensor]:
        if index == 2:
            with pytest.raises(
                BlockingIOError, match=rf"process may be writing {path}\.unfinished"
            ):
                write_store(path, made(bias=True))
        return one_of(experts)(index)

    write_store(path, made("meta", bias=True), expert)
    check_reads(ExpertStore.open(path, experts), experts)


KILLED = """
import os, signal, sys
import torch
from torchmoe.nn import Experts
from torchmoe.offload import write_store

path, step = sys.argv[1:]
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
held = Experts({h}, {i}, {e}, bias=True)

def expert(index):
    if step == "expert" and index == 3:
        kill()
    return {{name: tensor.detach()[index] for name, tensor in held.named_parameters()}}

if step != "expert":
    setattr(os, step, kill)
write_store(path, Experts({h}, {i}, {e}, bias=True, device="meta"), expert)
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", ["expert", "fsync", "replace"])
@pytest.mark.parametrize("first", [True, False])
def test_a_process_that_is_killed(path: Path, experts: Experts, step: str, first: bool) -> None:
    before = path.read_bytes()
    if first:
        path.unlink()
    program = KILLED.format(h=H, i=INNER, e=E)
    killed = subprocess.run([sys.executable, "-c", program, str(path), step], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = {path.name + ".unfinished"}
    assert set(os.listdir(path.parent)) == left | (set() if first else {path.name})
    if not first:
        assert path.read_bytes() == before
    write_store(path, experts)
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == before
