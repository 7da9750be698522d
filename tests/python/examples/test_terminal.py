"""Programs at a terminal: closed pipes, full disks, no output at all, impatient fingers."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_lm
from training import checkpoint, terminal

EXAMPLES = Path(train_lm.__file__).parent
PROGRAMS = ("train_lm", "gating_walkthrough")
FULL = Path("/dev/full")


def shell(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which $@ are the arguments and $PYTHON runs Python."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command, "bash", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHON": sys.executable},
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_is_run_like_this(program: str) -> None:
    source = (EXAMPLES / f"{program}.py").read_text()
    assert source.endswith('if __name__ == "__main__":\n    terminal.run(main)\n')


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_finds_its_modules_by_itself(program: str) -> None:
    # -I and -P leave a program's folder out of the path.
    done = shell('"$PYTHON" -I "$@" --help', str(EXAMPLES / f"{program}.py"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize(
    ("redirection", "status", "message"),
    [
        (">&-", 0, ""),
        (">/dev/full", 1, "gating_walkthrough.py: cannot write what it prints: No space left"),
        ("| true", 1, ""),
    ],
)
def test_a_program_that_prints_at_its_end(redirection: str, status: int, message: str) -> None:
    if "full" in redirection and not FULL.exists():
        pytest.skip("needs /dev/full")
    result = shell(f'"$PYTHON" "$@" {redirection}', str(EXAMPLES / "gating_walkthrough.py"))
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == (1 if message else 0)
    assert result.returncode == status


def training(tiny: list[str], out: Path) -> list[str]:
    steps = ["--steps", "40", "--checkpoint-every", "5"]
    return [str(EXAMPLES / "train_lm.py"), *tiny, *steps, "--out", str(out)]


def test_training_without_an_output(tiny: list[str], tmp_path: Path) -> None:
    result = shell('"$PYTHON" "$@" >&-', *training(tiny, tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    assert checkpoint.load(tmp_path).progress.step == 40
    assert (tmp_path / "results.json").exists()


def test_training_into_a_closed_pipe(tiny: list[str], tmp_path: Path) -> None:
    result = shell('"$PYTHON" -u "$@" | head -1', *training(tiny, tmp_path))
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    assert result.returncode == 1


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_training_onto_a_full_disk(tiny: list[str], tmp_path: Path) -> None:
    """The checkpoints are elsewhere, and stay."""
    assert shell('"$PYTHON" "$@"', *training(tiny, tmp_path)).returncode == 0
    result = shell('"$PYTHON" -u "$@" >/dev/full', *training(tiny, tmp_path), "--resume")
    assert result.returncode == 1
    assert result.stderr == "train_lm.py: cannot write what it prints: No space left on device\n"
    assert checkpoint.load(tmp_path).progress.step == 40


@pytest.mark.parametrize("presses", [1, 2, 3, 5])
def test_ctrl_c_several_times(tiny: list[str], tmp_path: Path, presses: int) -> None:
    """They are one: it ends the step and saves, and no traceback ever."""
    arguments = [*training(tiny, tmp_path), "--steps", "100000"]
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        deadline = time.monotonic() + 60
        metrics = tmp_path / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        for _ in range(presses):
            child.send_signal(signal.SIGINT)
            time.sleep(0.004)
        output, errors = child.communicate(timeout=60)
    assert errors == ""
    assert child.returncode == 130
    assert f"interrupted after {checkpoint.load(tmp_path).progress.step} steps" in output


def test_ctrl_c_after_the_stop_is_still_the_same_press() -> None:
    """What handled Ctrl-C before is back in its place when the last of the presses comes."""
    before = signal.signal(signal.SIGINT, terminal.OnePress(signal.default_int_handler))
    try:
        with terminal.asked_to_stop() as received:
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert received == [signal.SIGINT]


def test_ctrl_c_leaves_a_background_job_alone(tiny: list[str], tmp_path: Path) -> None:
    """A script starts it with Ctrl-C ignored, which then reaches both."""
    job = shlex.join([sys.executable, *training(tiny, tmp_path), "--steps", "300"])
    with subprocess.Popen(
        ["bash", "-c", f"{job} & wait"], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as script:
        deadline = time.monotonic() + 60
        metrics = tmp_path / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(script.pid, signal.SIGINT)
        output, _ = script.communicate(timeout=60)
    assert script.returncode == -signal.SIGINT
    assert "interrupted" not in output
    assert checkpoint.load(tmp_path).progress.step == 300


def test_the_report_of_the_installation() -> None:
    assert shell('"$PYTHON" -m torchmoe >&-').stderr == ""
    if FULL.exists():
        result = shell('"$PYTHON" -m torchmoe >/dev/full')
        assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr


def test_comparing_estimators_says_nothing_but_what_it_prints() -> None:
    script = (
        "import torch\nfrom torchmoe.nn import MoE\n"
        "from torchmoe.testing import compare_estimators\n"
        "moe = MoE(8, 8, num_experts=4, top_k=2)\n"
        "print(compare_estimators(moe, [torch.randn(16, 8)], lambda y, x: (y - x).square().mean(),"
        " seeds=1, warm_up=0))\n"
    )
    result = shell('"$PYTHON" -c "$@"', script)
    assert (result.returncode, result.stderr) == (0, "")
    assert "exact" in result.stdout
