"""The demonstration of offloaded experts, with small ones."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import offload_demo
from refused import refused


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"H": 32, "INNER": 64, "E": 8}.items():
        monkeypatch.setattr(offload_demo, name, size)


ROW = re.compile(
    r"^ +(\d+) % +([\d.]+) MB +([\d.]+) +([\d.]+) +([\d.]+) MB/token +([\d.]+) t/s +([\d.]+) "
    r"+([\d.]+) t/s$",
    re.MULTILINE,
)


def test_shows_what_each_budget_gives(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    figure = tmp_path / "new" / "a.png"
    options = ["--layers", "2", "--tokens", "30", "--folder", str(tmp_path)]
    assert offload_demo.main([*options, "--figure", str(figure)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 layers of 8 experts, 0 MB; 30 tokens, 2 experts each\n")
    assert "the outputs are those of experts in memory, bit for bit\n" in printed
    assert f"figure: {figure}\n" in printed
    rows = [[float(cell) for cell in row] for row in ROW.findall(printed)]
    assert [row[0] for row in rows] == [25, 50, 75, 100]
    budgets, speeds, hit_rates, read, predicted, foreseen, linked = list(zip(*rows, strict=True))[
        1:
    ]
    assert list(budgets) == sorted(budgets)
    assert all(speed > 0 for speed in (*speeds, *predicted, *linked))
    assert len(set(foreseen)) == 1  # it is of the routers and not of the budget
    assert 0.25 < foreseen[0] <= 1
    assert list(hit_rates) == sorted(hit_rates)
    assert 0 < hit_rates[0] < hit_rates[-1] == 1
    assert read[-1] == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert os.listdir(tmp_path) == ["new"]


def test_counts_only_what_the_tokens_read(tmp_path: Path) -> None:
    """And not what was read before, to begin with residents."""
    x = offload_demo.tokens(20)
    layers, expected = offload_demo.write_layers(1, x, tmp_path)
    machine = offload_demo.Machine(1e9, 1e9, 1e9, 0.0, 1.0)
    for percent in (25, 100):
        row = offload_demo.measure(layers, x, expected, tmp_path, percent, machine)
        missed = round((1 - row.hit_rate) * 20 * offload_demo.K)
        expert_bytes = 4 * 3 * offload_demo.H * offload_demo.INNER
        assert row.megabytes_read == pytest.approx(missed * expert_bytes / 20 / 1e6)
    assert missed == 0


def test_neighbouring_tokens_are_alike() -> None:
    x = offload_demo.tokens(2000)
    assert x.var().item() == pytest.approx(1, abs=0.05)
    assert (x[1:] * x[:-1]).mean().item() == pytest.approx(offload_demo.STAYS, abs=0.05)


def test_an_output_that_differs_ends_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = offload_demo.run

    def wrong(*arguments: Any, **options: Any) -> tuple[Any, Any, Tensor]:
        seconds, experts, outputs = run(*arguments, **options)
        return seconds, experts, torch.nextafter(outputs, torch.tensor(9.0))

    monkeypatch.setattr(offload_demo, "run", wrong)
    with pytest.raises(SystemExit, match="25 %: not the outputs of experts in memory"):
        offload_demo.main(["--layers", "1", "--tokens", "3", "--folder", str(tmp_path)])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--figure", "a.jpg"], "--figure: must end in .png, got a.jpg"),
        (["--layers", "0"], "argument --layers: must be a whole number from 1 to 64, got '0'"),
        (["--folder", "/nowhere"], "cannot write /nowhere/offload-demo-"),
    ],
)
def test_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    error = refused(capsys, offload_demo.main, *arguments).err
    assert error.startswith(f"offload_demo.py: error: {message}")
