"""The wheel of the checkout, for tests of what a user installs."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile

import torch

ROOT = Path(__file__).resolve().parents[2]
#: The environment's own tools come first: another CMake would compile everything again.
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def run(*command: str | Path, status: int | None = 0, **environment: str) -> str:
    """What a command prints, on either stream, if it ends with this status."""
    # A machine's settings of pip are not those of the user who is meant.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**kept, "PATH": PATH, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert status in (None, done.returncode), done.stdout
    return done.stdout


def pip(
    python: Path | str, *arguments: str | Path, status: int | None = 0, **environment: str
) -> str:
    """What pip prints; it knows no index, and there is no network."""
    alone = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    return run(python, "-m", "pip", *arguments, status=status, **alone, **environment)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Files of tests run at the same time, and they share the checkout's build folder."""
    folder = ROOT / "build"
    folder.mkdir(exist_ok=True)
    with (folder / "wheels.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_wheel(folder: Path) -> Path:
    """Makes it in the checkout, whose build folder has the library."""
    with one_at_a_time():
        pip(
            sys.executable,
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            f"--wheel-dir={folder}",
            ROOT,
        )
    (file,) = folder.iterdir()
    return file


def unpack(wheel: Path, folder: Path) -> Path:
    """The package of the wheel in this folder, with torch next to it, as an installer puts them."""
    with ZipFile(wheel) as archive:
        archive.extractall(folder)
    (folder / "torch").symlink_to(Path(torch.__file__).parent)
    return folder / "torchmoe"
