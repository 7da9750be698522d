"""The comparison with dense models: its program, what it refuses, and what it tries."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from begun_study import begun
from dense_comparison import COMMON
from refused import refused
from studies.dense import budget, candidates
from studies.dense.confirmation import DENSE, MIXTURE
from studies.dense.program import SETTLED, main
from training.settings import flag

RUN = re.compile(
    r"^  (\S+)-lr(\S+)-seed(\d)-steps(\d+) +training ([\d.]+) +held-out ([\d.]+)", re.M
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dense")


@pytest.fixture
def options(tiny: list[str], data: list[str], folder: Path) -> list[str]:
    """Of a comparison of few models in seconds."""
    return [
        *tiny[: tiny.index("--data")],
        *("--data", data[0], "--second-data", data[1]),
        *("--steps", "12", "--seeds", "2", "--out", str(folder)),
        *("--candidates", "E4-K2", "E4-K2-none", "W32", "W48"),
    ]


@pytest.mark.study
def test_a_killed_one_leaves_what_it_did(options: list[str], folder: Path) -> None:
    child = begun("dense", [*options, "--jobs", "1"], RUN)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate(timeout=60)
    assert (folder / budget.FILE).exists()
    assert list(folder.glob("*/outcome.json"))
    assert not (folder / "dense.json").exists()


@pytest.mark.study
def test_goes_on_and_compares(
    options: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = (folder / budget.FILE).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/outcome.json")}
    assert before
    assert main([*options, "--jobs", "2"]) == 0
    output = capsys.readouterr().out
    assert (folder / budget.FILE).read_bytes() == times
    assert {path: path.stat().st_mtime_ns for path in before} == before  # not trained again

    runs = {
        (text_and_model, lr, seed, steps)
        for text_and_model, lr, seed, steps, *_ in RUN.findall(output)
    }
    report = json.loads((folder / "dense.json").read_text())
    tried, chosen = report["tried"], report["chosen"]
    rounds = report["step_times"]["rounds"]
    for name, one in tried.items():
        fit = 12 * min(rounds["E4-K2"]) / min(rounds[name])
        assert one["steps"] == max(1, math.floor(fit * (1 + 1e-12)))
        assert len(one["training_loss_by_rate_of_a_part"]) >= 3
        assert (f"first-{name}", f"{one['lr']:g}", "0", f"{one['steps']}") in runs
    assert tried["E4-K2"]["steps"] == 12
    for side, names in {"mixture": "E", "dense": "W"}.items():
        of_side = [name for name in tried if name.startswith(names)]
        assert chosen[side]["name"] == min(of_side, key=lambda name: tried[name]["training_loss"])
    # Nothing but the choice was trained with the seed that chose, and on the first text.
    assert {run[0].partition("-")[0] for run in runs if run[2] == "0"} == {"first"}
    confirmed = {run for run in runs if run[2] != "0"}
    assert {run[0].partition("-")[2] for run in confirmed} == {
        one["name"] for one in chosen.values()
    }
    for text in ("first", "second"):
        result = report["results"][text]
        own = {side: f"{chosen[side]['steps']}" for side in ("mixture", "dense")}
        both = min(map(int, own.values()))
        for side, held_out in result["held_out"].items():
            assert held_out.keys() == {*map(str, (both // 4, both // 2, both)), own[side]}
            assert {len(losses) for losses in held_out.values()} == {2}
        mixture, dense = (result["held_out"][side][own[side]] for side in ("mixture", "dense"))
        apart = np.subtract(mixture, dense)
        assert apart.any()
        assert result["equal_time"]["mean"] == pytest.approx(apart.mean())
        assert f" {apart.mean():+.4f} " in output
        assert result["equal_bytes"].keys() == {f"{both // 4}", f"{both // 2}", f"{both}"}
    assert str(folder) not in json.dumps({k: v for k, v in report.items() if k != "torchmoe"})
    assert (folder / "dense.png").stat().st_size > 10_000
    # Weights would fill the disk.
    assert not list(folder.glob("*/checkpoints/*"))

    # Once more, and no process is begun for what is over.
    assert main([*options, "--jobs", "2"]) == 0
    again = capsys.readouterr().out
    assert sorted(RUN.findall(again)) == sorted(RUN.findall(output))
    assert json.loads((folder / "dense.json").read_text()) == report


@pytest.mark.study
def test_keeps_to_the_settings_of_its_folder(
    options: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, main, *options, "--hidden-size", "64").err
    assert "step_times.json has the step times of other models" in error
    (folder / budget.FILE).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "step_rounds", lambda kinds, _text: {name: [1.0] for name in kinds})
        error = refused(capsys, main, *options, "--hidden-size", "64").err
    assert "first-E4-K2-lr0.0015-seed0-steps3: --hidden-size is 32 in the run to resume" in error


@pytest.mark.parametrize("name", [name for name in SETTLED if name not in ("load", "resume")])
def test_refuses_what_it_chooses_itself(
    name: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = {"feed_forward": "dense", "normalize": "none"}.get(name, "1")
    error = refused(capsys, main, *tiny, flag(name), value, "--out", str(tmp_path)).err
    assert error.startswith(
        f"python -m studies.dense: error: {flag(name)} is not to be given: the comparison chooses"
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--candidates E5-K2", "--candidates must name some of E4-K1, E4-K2, E8-K1, .*, got E5-K2"),
        (
            "--candidates W16 E4-K2-none",
            "--candidates must name at least one of E4-K1, .*, got none",
        ),
        ("--candidates E4-K2", "--candidates must name at least one of W16, W32, .*, got none"),
        ("--intermediate-size 15", "--intermediate-size must be even, .*, got 15"),
        ("--communication", "--top-k must be at least 2 with --communication, got 1"),
        ("--second-data nowhere", "--data: nowhere: no such file or folder"),
    ],
)
def test_refuses(
    option: str,
    message: str,
    tiny: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = refused(capsys, main, *tiny, *option.split(), "--out", str(tmp_path)).err
    assert re.match(f"python -m studies.dense: error: {message}", error)


def test_mixtures() -> None:
    side = candidates.mixtures(COMMON)
    sizes = {name: (some.experts, some.top_k) for name, some in side.first.items()}
    assert sizes == {f"E{e}-K{k}": (e, k) for e in (8, 16, 32) for k in (1, 2)}
    assert candidates.plain(COMMON) in side.first
    assert side.around.keys() == side.first.keys()
    assert [*side.around["E16-K1"]] == ["E16-K1-fine", "E16-K1-shared"]
    fine, shared, none = side.around["E16-K2"].values()
    assert (fine.experts, fine.top_k, fine.intermediate_size) == (32, 4, 128)
    assert (shared.experts, shared.top_k, shared.shared_experts) == (16, 2, 1)
    assert none == replace(
        side.first["E16-K2"], normalize="none", out=str(Path(COMMON.out) / "E16-K2-none")
    )


def test_dense_models() -> None:
    side = candidates.dense_models(COMMON)
    assert [*side.first] == ["W256", "W512", "W1024", "W2048"]
    assert {name: [*some] for name, some in side.around.items()} == {
        "W256": ["W192", "W384"],
        "W512": ["W384", "W768"],
        "W1024": ["W768", "W1536"],
        "W2048": ["W1536", "W3072"],
    }
    for name, some in side.all.items():
        assert some.feed_forward == "dense"
        assert some.top_k * some.intermediate_size == int(name[1:])


def test_some_are_tried_where_they_are_named() -> None:
    every = {MIXTURE: candidates.mixtures(COMMON), DENSE: candidates.dense_models(COMMON)}
    assert candidates.selected(every, ()) == every
    some = candidates.selected(every, ("W512", "W768", "E8-K2", "E32-K1"))
    assert [*some[MIXTURE].all] == ["E8-K2", "E32-K1"]
    assert [*some[DENSE].all] == ["W512", "W768"]
    assert [*some[DENSE].around["W512"]] == ["W768"]
