"""What is left of a run of a comparison, and the time of a step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from studies.common import outcome, pool
from studies.common.outcome import KEPT, kept, step_rounds, step_seconds, trained
from training.corpus import CorpusError, Text
from training.run_folder import FolderError
from training.settings import Settings, SettingsError


@pytest.fixture
def settings(data: list[str], tmp_path: Path) -> Settings:
    return Settings(
        data=tuple(data),
        out=str(tmp_path / "run"),
        **{"steps": 3, "layers": 1, "hidden_size": 32, "intermediate_size": 8, "experts": 2},
        **{"context": 16, "batch_tokens": 64, "threads": 1},
    )


def test_a_run_that_is_over_is_read_and_not_trained_again(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Text.load(list(settings.data))
    assert kept(settings, text) is None
    first = trained(settings, text)
    assert first.records[-1].step == 3
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    log = (tmp_path / "run" / "log.txt").read_bytes()

    monkeypatch.setattr(outcome.train_lm, "new_job", None)  # nothing is made
    assert trained(settings, text) == kept(settings, text) == first
    assert (tmp_path / "run" / "log.txt").read_bytes() == log
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    elsewhere = replace(settings, out=str(moved), threads=2)
    assert trained(elsewhere, text) == replace(first, settings=elsewhere)


def test_a_run_that_is_over_is_of_its_settings_and_its_text(settings: Settings) -> None:
    text = Text.load(list(settings.data))
    trained(settings, text)
    with pytest.raises(SettingsError, match=r"--lr is 0.003 in the run to resume and cannot"):
        kept(replace(settings, lr=0.1), text)
    with pytest.raises(CorpusError, match=r"--data: the text is not the one that .*run was train"):
        kept(settings, Text.load([settings.data[0]]))


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"settings": {"steps": 3}}'])
def test_what_is_kept_may_be_damaged(damage: str, settings: Settings) -> None:
    text = Text.load(list(settings.data))
    trained(settings, text)
    (Path(settings.out) / KEPT).write_text(damage)
    with pytest.raises(FolderError, match=r"outcome.json is not what a run left: "):
        trained(settings, text)


def test_runs_that_are_over_need_no_process(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Text.load(list(settings.data))
    runs = {
        name: replace(settings, lr=lr, out=f"{settings.out}-{name}")
        for name, lr in {"a": 1e-3, "b": 2e-3}.items()
    }
    outcomes = {name: trained(some, text) for name, some in runs.items()}
    monkeypatch.setattr(pool, "train_one", None)
    seen = []
    with pool.workers(2) as workers:
        assert pool.train_all(runs, workers, lambda name, _: seen.append(name)) == outcomes
    assert seen == ["a", "b"]
    content = json.loads((Path(runs["b"].out) / KEPT).read_text())
    content["held_out"] = "low"
    del content["parameters"]
    (Path(runs["b"].out) / KEPT).write_text(json.dumps(content))
    message = r"^b: --out: .*outcome.json is not what a run left"
    with pytest.raises(pool.RunError, match=message), pool.workers(2) as workers:
        pool.train_all(runs, workers, lambda *_: None)


def test_the_time_of_a_step_is_that_of_the_fastest_round(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "TIMED_ROUNDS", 3)
    monkeypatch.setattr(outcome, "TIMED_STEPS", 2)
    text = Text.load(list(settings.data))
    turns = []
    now = [0.0]

    def optimizer_step(job: object, *_: object) -> None:
        turns.append(job.settings.experts)
        now[0] += {2: 0.5, 4: 1.5}[job.settings.experts] + (1 if len(turns) <= 4 else 0)

    monkeypatch.setattr(outcome.train_lm, "optimizer_step", optimizer_step)
    monkeypatch.setattr(outcome.time, "perf_counter", lambda: now[0])
    kinds = {"small": settings, "large": replace(settings, experts=4)}
    assert step_rounds(kinds, text) == {"small": [1.5, 0.5, 0.5], "large": [2.5, 1.5, 1.5]}
    assert turns == [2, 2, 4, 4] * 3  # they take turns
    now[0] = 0.0
    turns.clear()
    assert step_seconds(kinds, text) == {"small": 0.5, "large": 1.5}
