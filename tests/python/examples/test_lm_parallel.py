"""Two processes train what one process trains, and go on where they were stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import train_lm
from training import checkpoint

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)
PROCESSES = 2


def torchrun(*options: str) -> subprocess.CompletedProcess[str]:
    """The script in two processes."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={PROCESSES}", train_lm.__file__, *options),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in records(out)]


@pytest.mark.parametrize("more", ["", "--estimator default_vector", "--balance bias"])
def test_two_processes_give_the_loss_curve_of_one(
    more: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # In float64, so that only a wrong formula can tell the curves apart: the sums are formed in
    # another order, which 30 steps of training magnify, but from 1e-16.
    options = [*tiny, "--steps", "30", "--dtype", "float64", "--checkpoint-every", "15"]
    options += more.split()
    one, two, resumed = tmp_path / "one", tmp_path / "two", tmp_path / "resumed"
    assert train_lm.main([*options, "--out", str(one)]) == 0
    printed = capsys.readouterr().out
    result = torchrun(*options, "--out", str(two))
    assert result.returncode == 0, result.stderr
    assert losses(two) == pytest.approx(losses(one), rel=1e-9)
    # The experts' numbers are those of both processes; only MaxVio is larger in a part.
    for mine, theirs in zip(records(one), records(two), strict=True):
        assert theirs["load"] == mine["load"]
        assert theirs["dead"] == mine["dead"]
        assert theirs["balance"] == [pytest.approx(loss, rel=1e-9) for loss in mine["balance"]]
        pairs = zip(mine["max_violation"], theirs["max_violation"], strict=True)
        assert all(whole <= parts + 1e-12 for whole, parts in pairs)
    # One process prints and writes.
    assert result.stdout.count("held-out bits per byte") == printed.count("held-out bits per byte")

    # Resumed from its middle, the run ends with the same bits.
    (resumed / "checkpoints").mkdir(parents=True)
    middle = two / "checkpoints" / "step-00000015.safetensors"
    (resumed / "checkpoints" / middle.name).write_bytes(middle.read_bytes())
    again = torchrun("--resume", "--threads", "1", "--out", str(resumed))
    assert again.returncode == 0, again.stderr
    ends = [checkpoint.load(out).tensors for out in (two, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_refuses_a_batch_that_cannot_be_shared(tiny: list[str], tmp_path: Path) -> None:
    result = torchrun(*tiny, "--batch-tokens", "96", "--steps", "1", "--out", str(tmp_path))
    assert result.returncode != 0
    assert (
        "--batch-tokens must give every process as many windows, got 3 windows for 2 processes"
        in result.stderr
    )
