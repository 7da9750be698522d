"""Two runs in one folder: the second one says who has it, and a dead run has nothing."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_lm
from refused import refused
from training import run_folder
from training.run_folder import FolderError


def test_who_has_it(tmp_path: Path) -> None:
    holder = rf"process {os.getpid()} on {platform.node()} since 20\d\d-"
    with run_folder.locked(tmp_path):
        for _ in range(2):
            with (
                pytest.raises(FolderError, match=rf"^--out: {tmp_path} is in use by {holder}"),
                run_folder.locked(tmp_path),
            ):
                pass
    with run_folder.locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_many_at_once(tmp_path: Path) -> None:
    """One has it at a time, whoever takes its file away meanwhile."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom training import run_folder\n"
        "folder = Path(sys.argv[2])\nentered = 0\n"
        "for _ in range(20_000):\n"
        "    try:\n"
        "        with run_folder.locked(folder):\n"
        "            (folder / 'inside').touch(exist_ok=False)\n"
        "            (folder / 'inside').unlink()\n"
        "            entered += 1\n"
        "    except run_folder.FolderError as error:\n"
        "        assert 'in use by' in str(error), error\n"
        "    if entered == 200:\n"
        "        sys.exit()\n"
        "sys.exit('never got it often enough')\n"
    )
    examples = str(Path(train_lm.__file__).parent)
    command = [sys.executable, "-c", script, examples, str(tmp_path)]
    children = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_training_refuses_a_folder_in_use(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    out = ["--out", str(tmp_path)]
    assert train_lm.main([*tiny, *out, "--steps", "2"]) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    arguments = [*([] if more else [*tiny, "--steps", "4"]), *out, *more]
    with run_folder.locked(tmp_path):
        lock = tmp_path / run_folder.LOCK
        error = refused(capsys, train_lm.main, *arguments).err
        assert f"{tmp_path} is in use by process {os.getpid()} on" in error
        after = {path: path.stat().st_mtime_ns for path in before if path != lock}
        assert after == {path: time for path, time in before.items() if path != lock}
        assert train_lm.main(["--load", str(tmp_path), "--steps", "0"]) == 0, "it writes nothing"


def test_a_dead_run_has_nothing(tmp_path: Path) -> None:
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom training import run_folder\n"
        "with run_folder.locked(Path(sys.argv[2])):\n    print('has it', flush=True)\n"
        "    time.sleep(60)\n"
    )
    examples = str(Path(train_lm.__file__).parent)
    with subprocess.Popen(
        [sys.executable, "-c", script, examples, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "has it\n"
        with (
            pytest.raises(FolderError, match=rf"is in use by process {child.pid} on"),
            run_folder.locked(tmp_path),
        ):
            pass
        child.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with run_folder.locked(tmp_path):
            return
