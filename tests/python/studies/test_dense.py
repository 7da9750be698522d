"""The comparison with a dense model: what it tunes, trains and reports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from refused import refused
from studies.dense import program

RUN = re.compile(r"^  (\w+)-lr([\d.e-]+)-seed(\d)-steps(\d+) .* held-out ([\d.]+)", re.MULTILINE)


def runs_at_equal_bytes(output: str) -> list[tuple[str, ...]]:
    """Those before the runs whose number of steps a clock decides."""
    return RUN.findall(output.split("\nequal time\n")[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.mark.study
def test_compares(tiny: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*tiny, "--steps", "10", "--seeds", "2", "--out", str(folder)]
    assert program.main(options) == 0
    output = capsys.readouterr().out
    report = json.loads((folder / "dense.json").read_text())
    results = report["results"]
    assert list(results) == ["MoE", "dense", "dense, equal time"]
    assert results["MoE"]["bytes"] == results["dense"]["bytes"] == 10 * 256
    longer = round(10 * report["step_time_ratio"])
    assert results["dense, equal time"]["bytes"] == longer * 256
    assert results["dense"]["gain_of_moe"] == pytest.approx(
        [
            dense - moe
            for dense, moe in zip(
                results["dense"]["held_out_bits_per_byte"],
                results["MoE"]["held_out_bits_per_byte"],
                strict=True,
            )
        ]
    )
    # The learning rate with the least loss was taken, from rates on both sides or at the limit.
    runs = runs_at_equal_bytes(output)
    for kind in ("moe", "dense"):
        tried = {float(lr) for name, lr, *_ in runs if name == kind}
        assert len(tried) >= 3
    assert (folder / "dense.png").stat().st_size > 10_000

    # Once more, and nothing is trained again.
    logs = {path: path.read_text() for path in folder.glob("*/log.txt")}
    assert len(logs) >= 8
    capsys.readouterr()
    assert program.main(options) == 0
    assert runs_at_equal_bytes(capsys.readouterr().out) == runs
    for path, before in logs.items():
        assert "tokens/s" not in path.read_text()[len(before) :]


@pytest.mark.parametrize("option", ["--lr 0.1", "--seed 3", "--minutes 1", "--resume", "--steps 0"])
def test_refuses_what_it_chooses_itself(
    option: str, tiny: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, program.main, *tiny, *option.split(), "--out", str(folder)).err
    assert error.startswith(f"python -m studies.dense: error: {option.split()[0]} ")


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (3e-3, [1.5e-3, 3e-3, 6e-3]),
        (1.5e-3, [7.5e-4, 1.5e-3, 3e-3, 6e-3]),
        (1.2e-2, [1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2]),
        (1.0, [1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2]),
    ],
)
def test_tries_rates_until_the_best_is_inside(best: float, tried: list[float]) -> None:
    seen = []

    def run(rate: float) -> SimpleNamespace:
        seen.append(rate)
        return SimpleNamespace(tuning_loss=abs(rate - best))

    assert program.best_rate(run) == min(tried, key=lambda rate: abs(rate - best))
    assert sorted(seen) == pytest.approx(tried)
