"""The comparison with dense models: what it tries and chooses, what it says, how it goes on."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from begun_study import begun
from refused import refused
from studies.common.outcome import Outcome
from studies.dense import budget, candidates, flip, prose, report, search
from studies.dense.budget import StepTimes, step_times
from studies.dense.confirmation import DENSE, MIXTURE, Confirmed
from studies.dense.program import DEFAULTS, SETTLED, main
from studies.dense.search import Choice, Tried
from training import corpus
from training.cleaning import Document
from training.corpus import CorpusError, Text
from training.run_folder import FolderError
from training.settings import Settings, SettingsError, flag

RUN = re.compile(
    r"^  (\S+)-lr(\S+)-seed(\d)-steps(\d+) +training ([\d.]+) +held-out ([\d.]+)", re.M
)
COMMON = replace(DEFAULTS, out="some")


# ---- the program


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


# ---- what is tried


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


# ---- the time


def make_times(**rounds: list[float]) -> StepTimes:
    return StepTimes(rounds, "2 cores of a processor")


def test_steps_fit_into_the_time() -> None:
    times = make_times(plain=[0.3, 0.1, 0.2], fast=[0.07], slow=[0.26, 0.25], slowest=[900.0])
    spent = 1600 * times.seconds("plain")
    assert times.steps(spent, "plain") == 1600
    assert times.steps(spent, "fast") == 2285  # 160 s hold 2285.7
    assert times.steps(spent, "slow") == 640
    assert times.steps(spent, "slowest") == 1
    for seconds in (0.1, 0.07, 1 / 3, 0.0123):
        for count in (1, 3, 10, 49, 1600):
            assert make_times(a=[seconds]).steps(count * seconds, "a") == count


def test_says_how_far_rounds_are_apart() -> None:
    assert make_times(a=[0.1, 0.1, 0.9], b=[0.1, 0.13, 0.12]).unrest == pytest.approx(0.2)


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


# ---- the choice


def outcome(settings: Settings, loss: float, held_out: float = 9.0) -> Outcome:
    record: Any = SimpleNamespace(
        step=settings.steps, loss=loss, bytes=1024 * (settings.steps or 0)
    )
    return Outcome(settings, [record], held_out, 100, 50)


def trains(
    loss: Callable[[Settings], float], seen: list[Settings]
) -> Callable[[Sequence[Settings]], list[Outcome]]:
    """What says what a run's training loss would be, and remembers which runs there were."""

    def train(runs: Sequence[Settings]) -> list[Outcome]:
        seen.extend(runs)
        return [outcome(some, loss(some)) for some in runs]

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


# ---- where it flips


def test_lengths() -> None:
    assert flip.lengths({"mixture": 1600, "dense": 1420}) == {
        "mixture": [355, 710, 1420, 1600],
        "dense": [355, 710, 1420],
    }
    assert flip.lengths({"mixture": 3, "dense": 3}) == {"mixture": [1, 3], "dense": [1, 3]}


def test_steps_to_a_loss() -> None:
    curve = {400: 3.0, 100: 5.0, 200: 4.0}  # straight over the logarithm
    assert flip.steps_to(5.0, curve) == pytest.approx(100)
    assert flip.steps_to(4.5, curve) == pytest.approx(100 * math.sqrt(2))
    assert flip.steps_to(3.0, curve) == 400
    assert math.isnan(flip.steps_to(5.1, curve))
    assert math.isnan(flip.steps_to(2.9, curve))
    assert flip.steps_to(2.0, {7: 2.0}) == 7
    # Of two crossings the later; a stretch without a slope ends at its end.
    assert flip.steps_to(4.0, {1: 4.5, 2: 3.0, 4: 5.0, 8: 3.0}) == pytest.approx(4 * math.sqrt(2))
    assert flip.steps_to(4.0, {1: 4.0, 2: 4.0, 4: 3.0}) == pytest.approx(2)


def falling(start: float, lengths: Sequence[int]) -> dict[int, float]:
    """One bit less for each doubling of the steps."""
    return {steps: start - math.log2(steps) for steps in lengths}


@pytest.mark.parametrize("head_start", [0.3, 0.0, -0.3])
def test_the_ratio_is_that_of_the_steps_for_the_same_loss(head_start: float) -> None:
    mixture = falling(10 - head_start, [250, 500, 1000, 1100])
    dense = falling(10, [250, 500, 1000])
    assert flip.flip_ratio(mixture, dense) == pytest.approx(2**head_start)


def test_a_ratio_out_of_reach_is_none() -> None:
    mixture, dense = falling(7, [250, 500, 1000]), falling(10, [250, 500, 1000])
    assert math.isnan(flip.flip_ratio(mixture, dense))
    assert math.isnan(flip.flip_ratio(dense, mixture))


def test_the_mean_ratio_is_geometric() -> None:
    mean, low, high = flip.mean_ratio([0.5, 2.0], 0.95)
    assert mean == pytest.approx(1)
    assert math.log(high) == pytest.approx(12.706205 * math.log(2), rel=1e-5)
    assert low == pytest.approx(1 / high)
    assert np.isnan(flip.mean_ratio([0.5, math.nan], 0.95)).all()
    mean, low, _ = flip.mean_ratio([0.5], 0.95)
    assert mean == pytest.approx(0.5)
    assert math.isnan(low)


# ---- what it says


def confirmed(gain: Sequence[float], seeds: int = 3) -> Confirmed:
    """The mixture's losses lie below those of the dense model by `gain`, seed by seed."""

    def runs(steps: int, gains: Sequence[float]) -> list[Outcome]:
        settings = replace(COMMON, steps=steps)
        return [
            outcome(settings, 3.0, 12 - math.log2(steps) + 0.5 * seed - gains[seed])
            for seed in range(seeds)
        ]

    return Confirmed(
        {
            MIXTURE: {steps: runs(steps, gain) for steps in (200, 400, 800, 900)},
            DENSE: {steps: runs(steps, [0.0] * seeds) for steps in (200, 400, 800)},
        }
    )


def test_differences_are_taken_seed_by_seed() -> None:
    found = confirmed([0.1, 0.2, 0.3])
    assert found.shared == [200, 400, 800]
    assert {side: found.own(side) for side in (MIXTURE, DENSE)} == {MIXTURE: 900, DENSE: 800}
    reach = 4.302653 * 0.1 / math.sqrt(3)  # the quantile of 2 degrees of freedom
    for steps in found.shared:
        apart = found.at_equal_bytes(steps)
        assert tuple(apart) == pytest.approx((-0.2, -0.2 - reach, -0.2 + reach), abs=1e-6)
    longer = math.log2(900 / 800)
    assert found.at_equal_time().mean == pytest.approx(-0.2 - longer)
    assert found.flips() == pytest.approx([2**0.1, 2**0.2, 2**0.3])
    assert found.flip().mean == pytest.approx(2**0.2)


def test_verdict() -> None:
    unit = r"\d\.\d{4} \(\d\.\d{4} to \d\.\d{4}\) bits per byte"
    better = report.verdict("first", confirmed([0.1, 0.2, 0.3]))
    assert re.fullmatch(f"first: at equal time the mixture is better by {unit}", better)
    worse = report.verdict("first", confirmed([-0.5, -0.6, -0.5]))
    assert re.fullmatch(f"first: at equal time the mixture is worse by {unit}", worse)
    unclear = report.verdict("first", confirmed([-0.5, 0.6, -0.5]))
    assert unclear == "first: at equal time no difference that 3 seeds can show"
    alone = report.verdict("first", confirmed([0.1], seeds=1))
    assert alone == "first: one seed gives no interval"


@pytest.mark.parametrize("seeds", [1, 3])
def test_report(seeds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = replace(COMMON, data=("/home/me/text",), out=str(tmp_path))
    names = {MIXTURE: "E32-K2-shared", DENSE: "W1024"}
    steps = {"E32-K2-shared": 900, "W1024": 800}
    runs = {name: outcome(replace(common, steps=some), 2.5) for name, some in steps.items()}
    study = report.Study(
        "It compares.",
        common,
        100.0,
        make_times(**{"E32-K2-shared": [0.1], "W1024": [0.125]}),
        steps,
        {name: Tried({3e-3: 2.7}, run) for name, run in runs.items()},
        {side: Choice(name, runs[name].settings, {3e-3: 2.5}) for side, name in names.items()},
        {"first": ["python", "cpp"], "second": ["prose.txt"]},
        {"first": confirmed([0.1, 0.2, 0.3], seeds), "second": confirmed([3.0, 0.2, 0.3], seeds)},
    )
    report.report(study)
    output = capsys.readouterr().out
    assert "chosen: mixture E32-K2-shared, dense W1024" in output
    assert "first text: python, cpp" in output
    assert "equal time: held-out after 100 s (steps: mixture 900, dense 800)" in output
    assert f"second: in 1 of {report.in_words(seeds)} one side's shortest run is better" in output
    (row,) = re.findall(r"^ first +0\.8000 .*$", output, re.M)
    if seeds == 1:
        assert row.split() == ["first", "0.8000", f"{2**0.1:.4f}", "n/a"]
        assert "first: one seed gives no interval" in output
    else:
        assert row.split()[2] == f"{2**0.2:.4f}"
        assert "first: at equal time the mixture is better by 0.3699 (" in output
    assert "…" not in output
    page = (tmp_path / "dense.md").read_text()
    assert page.count("|---|") == 5
    content = (tmp_path / "dense.json").read_text()
    assert "NaN" not in content
    assert str(tmp_path) not in content
    assert "/home" not in content


# ---- the second text


def test_the_held_out_tenth_of_the_prose_is_what_the_program_holds_out(tmp_path: Path) -> None:
    words = [f"word{number:04d}" for number in range(4000)]
    documents = [
        Document(f"{start}", " ".join(words[start : start + 100])) for start in range(0, 4000, 100)
    ]
    # One shares a run of words with one that is held out.
    copied = Document("copied", f"{documents[0].text}\n\n{' '.join(reversed(words[:300]))}")
    path = tmp_path / prose.FILE
    path.write_text(prose.with_held_out_tenth([*documents[:20], copied, *documents[20:]]))
    (domain,) = corpus.load([str(path)])
    (train,), (held_out,) = domain.train, domain.held_out
    assert held_out.text.startswith("word0000 word0001 ")
    assert "word0299 word0298 " in train.text
    assert train.runs.isdisjoint(held_out.runs)
    assert len(train.text) == 9 * len(held_out.text) > 30_000


def test_the_prose_is_of_packages_and_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prose, "PACKAGES", ("networkx", "nowhere_at_all"))
    path = prose.write(tmp_path)
    text = path.read_text()
    assert len(text) > 100_000
    assert "graph" in text
    assert "import networkx" not in text.partition("\n")[0]
    path.write_text("another")
    assert prose.write(tmp_path).read_text() == "another"
    monkeypatch.setattr(prose, "PACKAGES", ("nowhere_at_all",))
    path.unlink()
    with pytest.raises(CorpusError, match="too little text: use --second-data"):
        prose.write(tmp_path)
    assert not path.exists()


def test_the_second_text_can_be_read(data: list[str], tmp_path: Path) -> None:
    path = prose.write(tmp_path)
    text = Text.load([str(path)])
    (train,), (held_out,) = text.train.values(), text.held_out.values()
    assert len(train) > 2_000_000
    assert len(held_out) == pytest.approx(len(train) / 9, rel=0.02)
