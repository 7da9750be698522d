"""The folder of a run: what lies where, and how a file gets there whole or not at all.

run.json                  settings, versions and revision
metrics.jsonl             one JSON object per line, about every ten steps
tensorboard/              the same as TensorBoard events
checkpoints/              step-00003200.safetensors, the last two
figures/                  PNG and SVG
results.json              the numbers at the end; it is there once a run is over
.lock                     the process that trains here now
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import torch

import torchmoe

TEMPORARY = ".unfinished"  # ends the name of a file that is being written
LOCK = ".lock"  # who has the folder
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # of a file system
MARGIN_BYTES = 32 << 20  # room for metrics and figures


class FolderError(Exception):
    """The folder cannot be used; the message says why in one line."""


@dataclass(frozen=True)
class RunFolder:
    """The places of one run."""

    path: Path

    @property
    def run(self) -> Path:
        """Settings, versions and revision."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """What the training was like, as it went."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """See checkpoint.py."""
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        """See figures.py."""
        return self.path / "figures"

    @property
    def results(self) -> Path:
        """The numbers at the end."""
        return self.path / "results.json"

    @property
    def parts(self) -> tuple[Path, ...]:
        """All that a run leaves, in the order in which it can be taken away."""
        return (
            self.results,
            self.checkpoints,
            self.metrics,
            self.tensorboard,
            self.figures,
            self.run,
        )

    def make(self) -> None:
        """Makes the folders and proves that files can be written there, before there is work."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for folder in (self.path, self.checkpoints):
                tempfile.TemporaryFile(dir=folder).close()
            # What a killed process left; only under this program's own names.
            for stale in (*self.checkpoints.glob(f"*{TEMPORARY}"), *map(unfinished, self.parts)):
                stale.unlink(missing_ok=True)
        except OSError as error:
            raise self.unwritable(error) from error

    def check_room(self, checkpoint_bytes: int, resumes: bool) -> None:
        """Makes sure that the checkpoints will fit, before there is work to lose.

        Those that are there make room for new ones if the run `resumes`; else they are set aside.
        """
        kept = sum(file.stat().st_size for file in self.checkpoints.iterdir()) if resumes else 0
        # Two are kept while the third is written.
        needed = 3 * checkpoint_bytes + MARGIN_BYTES - kept
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise FolderError(
                f"--out: {self.path} must have {needed / 1e6:.0f} MB free for checkpoints, "
                f"got {free / 1e6:.0f} MB"
            )

    def unwritable(self, error: OSError) -> FolderError:
        """The error that says that and why."""
        return FolderError(f"--out: cannot write to {self.path}: {error.strerror}")

    def set_aside(self) -> Path | None:
        """Moves an earlier run's files into a folder of their own, which is returned."""
        present = [p for p in self.parts if p.is_file() or (p.is_dir() and any(p.iterdir()))]
        if not present:
            return None
        number = 1
        while (self.path / f"earlier-{number}").exists():
            number += 1
        aside = self.path / f"earlier-{number}"
        try:
            aside.mkdir()
            for part in present:
                part.rename(aside / part.name)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise self.unwritable(error) from error
        return aside


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Makes the folder and keeps it for this process until the block, or the process, ends.

    The operating system lets go of the lock with the process, however that ends, so that a dead
    run's file is none. Where the file system knows no locks, nobody is kept out.

    Raises:
        FolderError: another process has the folder, and the message says which; or it cannot be
            written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = _lock(path / LOCK)
    except OSError as error:
        raise RunFolder(path).unwritable(error) from error
    with file:
        try:
            yield
        finally:
            (path / LOCK).unlink(missing_ok=True)


def _lock(path: Path) -> TextIO:
    """The file, locked, with this process in it; raises FolderError where another has it."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _lies_at(path, file):
                file.close()  # the one who had it has taken the file away since it was opened
                continue
            file.truncate(0)
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            print(f"process {os.getpid()} on {platform.node()} since {since}", file=file)
            file.flush()
        except BlockingIOError as error:
            with file:
                file.seek(0)
                holder = file.read().strip() or "another process"
            raise FolderError(f"--out: {path.parent} is in use by {holder}") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                raise
        return file


def _lies_at(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def unfinished(path: Path) -> Path:
    """Where a file is while it is written."""
    return path.with_name(path.name + TEMPORARY)


def write(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a file that is there whole or not at all, whenever the process or machine stops.

    Into a neighbour first, which is forced to the disk and renamed; then the folder is forced to
    the disk too, since the new name is content of the folder.

    Raises:
        OSError: the disk is full or the folder cannot be written; what was there stays, unless
            only the last step failed, on the folder itself.
    """
    temporary = unfinished(path)
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, content: object) -> None:
    """One JSON document, indented for people."""
    try:
        write(path, [json.dumps(content, indent=2).encode() + b"\n"])
    except OSError as error:
        raise FolderError(f"--out: cannot write {path}: {error.strerror}") from error


def origin() -> dict[str, Any]:
    """What computes: versions, revision and command line."""
    return {"command": sys.argv, **versions()}


def versions() -> dict[str, Any]:
    """Those of all that computes, and the revision."""
    return {
        "torchmoe": torchmoe.build_info(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_revision": git_revision(),
    }


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def git_revision() -> str:
    """The revision of these files, "-changed" where they differ from it."""
    command = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12")
    try:
        answer = subprocess.run(
            [*command, "--exclude=*", "--dirty=-changed"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"  # no git here, or not a clone
    return answer.stdout.strip()
