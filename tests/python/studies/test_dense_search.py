"""The comparison with dense models: each model's time, and how two are chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dense_comparison import COMMON, ended, made_times
from studies.common.outcome import Outcome
from studies.dense import budget, candidates, search
from studies.dense.budget import step_times
from studies.dense.confirmation import DENSE, MIXTURE
from training.run_folder import FolderError
from training.settings import Settings, SettingsError


def test_steps_fit_into_the_time() -> None:
    times = made_times(plain=[0.3, 0.1, 0.2], fast=[0.07], slow=[0.26, 0.25], slowest=[900.0])
    spent = 1600 * times.seconds("plain")
    assert times.steps(spent, "plain") == 1600
    assert times.steps(spent, "fast") == 2285  # 160 s hold 2285.7
    assert times.steps(spent, "slow") == 640
    assert times.steps(spent, "slowest") == 1
    for seconds in (0.1, 0.07, 1 / 3, 0.0123):
        for count in (1, 3, 10, 49, 1600):
            assert made_times(a=[seconds]).steps(count * seconds, "a") == count


def test_says_how_far_rounds_are_apart() -> None:
    assert made_times(a=[0.1, 0.1, 0.9], b=[0.1, 0.13, 0.12]).unrest == pytest.approx(0.2)


def test_step_times_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"some": replace(COMMON, data=("notes",)), "other": replace(COMMON, hidden_size=64)}
    measured = []

    def step_rounds(kinds: Mapping[str, Settings], _text: object) -> dict[str, list[float]]:
        measured.append([*kinds])
        return {name: [0.5, 0.25] for name in kinds}

    monkeypatch.setattr(budget, "step_rounds", step_rounds)
    monkeypatch.setattr(budget, "cores", lambda: 1)
    text: Any = None
    first = step_times(tmp_path, kinds, text)
    assert first.seconds("other") == 0.25
    assert "1 cores of " in first.machine
    moved = {
        name: replace(some, out="moved", threads=2, steps=7, checkpoint_every=5)
        for name, some in kinds.items()
    }
    assert step_times(tmp_path, moved, text) == first
    assert measured == [["some", "other"]]
    for others in (
        {"some": kinds["some"]},
        {**kinds, "some": replace(kinds["some"], top_k=1)},
        {**kinds, "some": replace(kinds["some"], device="cuda")},
    ):
        with pytest.raises(SettingsError, match=r"step_times.json has the step times of other"):
            step_times(tmp_path, others, text)
    (tmp_path / budget.FILE).write_text("[]")
    with pytest.raises(FolderError, match=r"step_times.json does not hold step times"):
        step_times(tmp_path, kinds, text)


def trains(
    loss: Callable[[Settings], float], seen: list[Settings]
) -> Callable[[Sequence[Settings]], list[Outcome]]:
    """What says what a run's training loss would be, and remembers which runs there were."""

    def train(runs: Sequence[Settings]) -> list[Outcome]:
        seen.extend(runs)
        return [ended(some, loss(some)) for some in runs]

    return train


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
    seen: list[Settings] = []
    train = trains(lambda some: abs(some.lr - best), seen)
    found = search.tune({"a": replace(COMMON, lr=search.MIDDLE_RATE)}, train)["a"]
    assert search.best_rate(found) == min(tried, key=lambda rate: abs(rate - best))
    assert sorted(found) == sorted(some.lr for some in seen) == pytest.approx(tried)


def test_chooses_both_sides_alike() -> None:
    sides = {MIXTURE: candidates.mixtures(COMMON), DENSE: candidates.dense_models(COMMON)}
    every = {**sides[MIXTURE].all, **sides[DENSE].all}
    steps = {name: 1000 + 4 * place for place, name in enumerate(every)}
    wanted = {"E16-K2": 2.0, "E16-K2-shared": 1.5, "W1024": 3.0, "W768": 3.5}
    seen: list[Settings] = []

    def loss(some: Settings) -> float:
        name = Path(some.out).name
        full = some.steps == steps[name]
        best = 6e-3 if not full else 1.2e-2 if name == "E16-K2-shared" else 3e-3
        return wanted.get(name, 4.0) + abs(math.log2(some.lr / best)) / 100

    tried, chosen = search.search(sides, steps, trains(loss, seen))
    assert [*tried] == [
        *sides[MIXTURE].first,
        *sides[DENSE].first,
        *sides[MIXTURE].around["E16-K2"],
        *sides[DENSE].around["W1024"],
    ]
    assert {side: one.name for side, one in chosen.items()} == {
        MIXTURE: "E16-K2-shared",
        DENSE: "W1024",
    }
    for name, one in tried.items():
        assert one.rate == 6e-3  # the best of the short runs
        assert [*one.rates] == [1.5e-3, 3e-3, 6e-3, 1.2e-2]
        short = [some for some in seen if some.steps == steps[name] // 4]
        assert {some.lr for some in short} == {*one.rates}
    # All steps have another best rate, which the two that are chosen are given.
    assert chosen[MIXTURE].settings == replace(
        every["E16-K2-shared"], lr=1.2e-2, steps=steps["E16-K2-shared"]
    )
    assert chosen[DENSE].settings == replace(every["W1024"], lr=3e-3, steps=steps["W1024"])
    assert [*chosen[MIXTURE].rates] == [3e-3, 6e-3, 1.2e-2, 2.4e-2]
    assert [*chosen[DENSE].rates] == [1.5e-3, 3e-3, 6e-3, 1.2e-2]
    assert {some.seed for some in seen} == {0}
