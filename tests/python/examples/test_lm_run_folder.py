"""The folder of a run: refusals before there is work, earlier runs, whole files or none."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from training import run_folder
from training.run_folder import MARGIN_BYTES, FolderError, RunFolder

CHECKPOINT = "step-00000010.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A folder that is ready to be used."""
    folder = RunFolder(tmp_path / "runs" / "lm")
    folder.make()
    return folder


def names(path: Path) -> set[str]:
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}


def full_disk(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


def leave_files(folder: RunFolder, mark: str) -> dict[str, str]:
    """The files that a run leaves, by name, with their content."""
    files = {
        "run.json": mark,
        "metrics.jsonl": mark,
        "tensorboard/events": mark,
        f"checkpoints/{CHECKPOINT}": mark,
        "figures/loss.png": mark,
        "results.json": mark,
    }
    for name, content in files.items():
        path = folder.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    return files


# ---- make


def test_make_makes_what_is_needed_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "lm")
    for _ in range(2):
        folder.make()
        assert folder.checkpoints.is_dir()
        assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("runs", "Not a directory"),
        ("runs/lm", "Not a directory"),
        ("runs/lm/checkpoints", "File exists"),
    ],
)
def test_make_refuses_where_a_file_is_in_the_way(file: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    folder = RunFolder(tmp_path / "runs" / "lm")
    with pytest.raises(FolderError) as caught:
        folder.make()
    assert str(caught.value) == f"--out: cannot write to {folder.path}: {message}"
    assert path.read_text() == "mine"


@pytest.mark.parametrize("place", ["path", "checkpoints"])
def test_make_tries_to_write(
    place: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As root, who runs the tests here and there, permissions stop nobody.
    real = run_folder.tempfile.TemporaryFile

    def read_only(dir: Path) -> Any:
        if dir == getattr(folder, place):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(dir=dir)

    monkeypatch.setattr(run_folder.tempfile, "TemporaryFile", read_only)
    with pytest.raises(FolderError, match=r"^--out: cannot write to .*/lm: Permission denied$"):
        folder.make()


def test_make_removes_what_a_killed_process_left(folder: RunFolder) -> None:
    left = leave_files(folder, "x")
    foreign = folder.path / "thesis.unfinished"
    foreign.touch()
    for name in ("run.json", "metrics.jsonl", "results.json", f"checkpoints/{CHECKPOINT}"):
        run_folder.unfinished(folder.path / name).touch()
    folder.make()
    assert names(folder.path) == {*left, foreign.name}


# ---- check_room


@pytest.mark.parametrize(
    ("present", "resumes", "needed"),
    [
        (0, False, 3000 + MARGIN_BYTES),
        (0, True, 3000 + MARGIN_BYTES),
        (2000, True, 1000 + MARGIN_BYTES),  # replaced one after the other
        (2000, False, 3000 + MARGIN_BYTES),  # set aside, which frees nothing
    ],
)
def test_check_room(
    present: int, resumes: bool, needed: int, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.checkpoints / CHECKPOINT).write_bytes(b"x" * present)

    def disk_usage(path: Path) -> SimpleNamespace:
        assert path == folder.path
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    free = needed
    folder.check_room(1000, resumes)
    free = needed - 1
    with pytest.raises(FolderError):
        folder.check_room(1000, resumes)


def test_check_room_names_both_sizes(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=7_000_000))
    with pytest.raises(FolderError) as caught:
        folder.check_room(100_000_000, False)
    assert str(caught.value) == (
        f"--out: {folder.path} must have 334 MB free for checkpoints, got 7 MB"
    )


def test_check_room_asks_the_disk(folder: RunFolder) -> None:
    folder.check_room(1000, False)
    with pytest.raises(FolderError, match="MB free for checkpoints"):
        folder.check_room(1 << 60, False)


# ---- set_aside


def test_nothing_to_set_aside(folder: RunFolder) -> None:
    folder.figures.mkdir()
    (folder.path / "thesis.txt").write_text("mine")
    assert folder.set_aside() is None
    assert names(folder.path) == {"thesis.txt"}


def test_earlier_runs_are_set_aside_one_by_one(folder: RunFolder) -> None:
    (folder.path / "thesis.txt").write_text("mine")
    kept = {"thesis.txt": "mine"}
    for number in (1, 2, 3):
        files = leave_files(folder, f"run {number}")
        aside = folder.set_aside()
        assert aside == folder.path / f"earlier-{number}"
        kept |= {f"earlier-{number}/{name}": content for name, content in files.items()}
        assert {name: (folder.path / name).read_text() for name in names(folder.path)} == kept
        assert folder.checkpoints.is_dir()
        assert folder.set_aside() is None


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", f"checkpoints/{CHECKPOINT}"])
def test_a_part_of_a_run_is_set_aside_too(name: str, folder: RunFolder) -> None:
    (folder.path / name).write_text("x")
    assert folder.set_aside() == folder.path / "earlier-1"
    assert names(folder.path) == {f"earlier-1/{name}"}
    assert folder.checkpoints.is_dir()


def test_set_aside_that_fails_is_one_line(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_files(folder, "x")
    monkeypatch.setattr(Path, "rename", full_disk)
    with pytest.raises(FolderError, match=r"^--out: cannot write to .*: No space left on device$"):
        folder.set_aside()


# ---- write


def test_write_puts_the_parts_together(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"one", b"", b"four"):
        run_folder.write(path, (content[n : n + 1] for n in range(len(content))))
        assert path.read_bytes() == content
        assert names(tmp_path) == {"file"}


class FullFile:
    """A file on a disk that fills up with the second part."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.parts = 0

    def __enter__(self) -> FullFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        self.parts += 1
        if self.parts == 2:
            full_disk()
        self.file.write(data)


def fail_at_write(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode: FullFile(real(self, mode)))


def fail_at_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", full_disk)


def fail_at_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)


def fail_at_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", full_disk)


@pytest.mark.parametrize("fail", [fail_at_open, fail_at_write, fail_at_fsync, fail_at_replace])
@pytest.mark.parametrize("exists", [True, False])
def test_a_failed_write_changes_nothing(
    fail: Callable[[pytest.MonkeyPatch], None],
    exists: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "file"
    if exists:
        path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(OSError, match="No space left on device"):
            run_folder.write(path, [b"n", b"e", b"w"])
    assert names(tmp_path) == ({"file"} if exists else set())
    assert not exists or path.read_bytes() == b"old"
    run_folder.write(path, [b"new"])
    assert path.read_bytes() == b"new"


def test_an_interrupted_write_changes_nothing(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"n"
        raise KeyboardInterrupt

    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        run_folder.write(path, parts())
    assert (names(tmp_path), path.read_bytes()) == ({"file"}, b"old")


def test_write_forces_the_file_and_then_its_folder_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the file on the disk before it gets its name, no crash can leave a name without content.
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if is_folder:
            assert os.path.samestat(os.fstat(descriptor), tmp_path.stat())
        else:
            assert (tmp_path / f"file{run_folder.TEMPORARY}").read_bytes() == b"content"
        calls.append("folder" if is_folder else "file")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    run_folder.write(tmp_path / "file", [b"con", b"tent"])
    assert calls == ["file", "replace", "folder"]


def test_write_leaves_no_descriptor_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_for_folder(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            full_disk()

    before = len(os.listdir("/proc/self/fd"))
    run_folder.write(tmp_path / "file", [b"x"])
    monkeypatch.setattr(os, "fsync", fail_for_folder)
    with pytest.raises(OSError, match="No space left on device"):
        run_folder.write(tmp_path / "file", [b"x"])
    assert len(os.listdir("/proc/self/fd")) == before


def test_write_json(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None], "b": "é \udcff"}  # a file name that is not UTF-8 among them
    run_folder.write_json(tmp_path / "file.json", content)
    text = (tmp_path / "file.json").read_text(encoding="ascii")
    assert json.loads(text) == content
    assert text.startswith('{\n  "a": [')
    assert text.endswith("}\n")


def test_write_json_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(FolderError) as caught:
        run_folder.write_json(tmp_path / "file.json", {})
    assert str(caught.value) == (
        f"--out: cannot write {tmp_path / 'file.json'}: No space left on device"
    )


# ---- origin


def git(folder: Path, *arguments: str) -> str:
    settings = ("-c", "user.name=me", "-c", "user.email=me@here", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *settings, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file for the one whose revision is asked for, outside of git at first."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    source = tmp_path / "clone" / "lm" / "run_folder.py"
    source.parent.mkdir(parents=True)
    source.write_text("first")
    monkeypatch.setattr(run_folder, "__file__", str(source))
    return source


def test_git_revision(source: Path) -> None:
    clone = source.parents[1]
    assert run_folder.git_revision() == "unknown"
    git(clone, "init", "-q")
    assert run_folder.git_revision() == "unknown"  # nothing is committed
    git(clone, "add", ".")
    git(clone, "commit", "-q", "-m", "first")
    revision = git(clone, "rev-parse", "HEAD")[:12]
    git(clone, "tag", "-a", "v1", "-m", "the name of a tag says less than the revision")
    assert run_folder.git_revision() == revision
    source.write_text("second")
    assert run_folder.git_revision() == f"{revision}-changed"
    git(clone, "commit", "-q", "-a", "-m", "second")
    second = run_folder.git_revision()
    assert second == git(clone, "rev-parse", "HEAD")[:12]
    assert second != revision


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory: 'git'"),
        subprocess.TimeoutExpired("git", 10),
    ],
)
def test_git_revision_without_git(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    assert run_folder.git_revision() == "unknown"


def test_origin_goes_into_json(source: Path, tmp_path: Path) -> None:
    origin = run_folder.origin()
    run_folder.write_json(tmp_path / "run.json", origin)
    assert json.loads((tmp_path / "run.json").read_text()) == origin
    assert origin["command"] == sys.argv
    assert origin["git_revision"] == "unknown"
    assert origin.keys() == {"command", "torchmoe", "torch", "python", "platform", "git_revision"}
