"""Writing a file of experts, and what a failing disk or process leaves."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from stored import BYTES, INNER, E, H, check_reads, made, one_of, tensors
from torchmoe.nn import Experts
from torchmoe.offload.store import ExpertStore
from torchmoe.offload.writing import write_store

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
