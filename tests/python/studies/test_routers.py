"""The comparison of routers: what it trains and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from refused import refused
from studies.common import pool
from studies.routers import program
from torchmoe.nn import CosineRouter, ExpertCommunication, HashRouter, Router, SequenceRouter
from train_lm import ByteLM
from training.routers import ROUTERS, looks_ahead
from training.settings import Settings

CLASSES = {
    "linear": Router,
    "cosine": CosineRouter,
    "hash": HashRouter,
    "sequence_first": SequenceRouter,
}


pytestmark = pytest.mark.usefixtures("one_core")


@pytest.mark.study
def test_compares(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*tiny, "--steps", "6", "--checkpoint-every", "3", "--seeds", "1"]
    names = ["cosine", "hash", "sequence_first", "linear+communication"]
    assert program.main([*options, "--routers", *names, "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    results = json.loads((tmp_path / "routers.json").read_text())["results"]
    assert list(results) == ["linear", *names]
    assert len({result["final_held_out"][0] for result in results.values()}) == 5
    for name in results:
        assert re.search(rf"^ {re.escape(name)} ", output, re.MULTILINE)
    assert (tmp_path / "routers.png").stat().st_size > 10_000
    settings = json.loads((tmp_path / "hash-seed0-steps6" / "run.json").read_text())["settings"]
    assert settings["router"] == "hash"


def test_compares_every_causal_router_unless_told(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = {}

    def train_all(runs: dict[str, Settings], _workers: object, _finished: object) -> None:
        planned.update(runs)
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "train_all", train_all)
    assert program.main([*tiny, "--out", str(tmp_path)]) == 130
    kinds = {(one.router, one.communication) for one in planned.values()}
    causal = [name for name in ROUTERS if looks_ahead(name) is None]
    assert causal[: len(CLASSES)] == list(CLASSES)
    assert kinds == {*((name, False) for name in causal), ("linear", True)}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("suffix", ["", "+communication"])
def test_the_model_is_made_of_what_was_named(name: str, suffix: str) -> None:
    common = replace(Settings(), layers=2, hidden_size=32, intermediate_size=8)
    model = ByteLM(program.settings_of(name + suffix, common).model())
    assert len(model.moes) == 2
    for moe in model.moes:
        assert type(moe.router) is CLASSES[name]
        assert isinstance(moe.experts, ExpertCommunication) == bool(suffix)
    if name == "hash":
        assert len({moe.router.seed for moe in model.moes}) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("magic", r"argument --routers: must name one of linear, cosine, hash, sequence_first, "),
        ("sequence_mean", "--router must not look ahead in a causal language model ("),
        ("linear", r"--routers must name one besides linear, got none"),
    ],
)
def test_refuses(
    name: str, message: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, program.main, *tiny, "--routers", name, "--out", str(tmp_path)).err
    assert error.startswith(f"python -m studies.routers: error: {message}")
