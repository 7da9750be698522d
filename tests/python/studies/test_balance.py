"""The comparison of balancing methods: the collapsed start, what recovers, and what is reported."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import torchmoe
from refused import refused
from studies.balance import experiment, program, report
from studies.balance.experiment import CONTROL, EXPERTS, HEALTHY, METHODS, TOP_K, Run
from torchmoe.nn import Balance

COLLAPSED = [name for name, method in METHODS.items() if method.starts_collapsed]
# Both recover after 200 to 360 steps, with any seed.
RECOVERING = ("load_balancing:batch", "selection_bias")
STEPS = 600


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a short run with two methods prints, and its folder."""
    folder = tmp_path_factory.mktemp("balance") / "new" / "folder"
    output = io.StringIO()
    options = ["--steps", str(STEPS), "--seeds", "1", "--out", str(folder)]
    with contextlib.redirect_stdout(output):
        assert program.main([*options, "--methods", *RECOVERING]) == 0
    return output.getvalue(), folder


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "balance.json").read_text())
    return content


# ---- the program


@pytest.mark.study
def test_the_control_stays_collapsed(trained: tuple[str, Path]) -> None:
    control = read(trained[1])["results"][CONTROL]
    assert control["recovered_after_steps"] == [None]
    assert control["max_violation"] == [EXPERTS / TOP_K - 1]
    assert control["dead_experts"] == [EXPERTS - TOP_K]
    assert set(control["curves"]["max_violation"][0]) == {EXPERTS / TOP_K - 1}


@pytest.mark.study
@pytest.mark.parametrize("name", RECOVERING)
def test_recovers(name: str, trained: tuple[str, Path]) -> None:
    results = read(trained[1])["results"]
    (steps,) = results[name]["recovered_after_steps"]
    assert 0 < steps <= 0.9 * STEPS
    assert results[name]["max_violation"][0] < experiment.BOUND
    assert results[name]["dead_experts"] == [0]
    # More experts pay, and not by a hair.
    assert results[name]["task_loss"][0] < 0.9 * results[CONTROL]["task_loss"][0]


@pytest.mark.study
def test_json_holds_what_the_table_shows(trained: tuple[str, Path]) -> None:
    output, folder = trained
    written = read(folder)
    assert list(written["results"]) == [CONTROL, *RECOVERING]
    assert written["steps"] == STEPS
    assert written["learning_rate"] == experiment.LR
    assert str(folder) not in json.dumps(written)
    for name, result in written["results"].items():
        (steps,), (dead,) = result["recovered_after_steps"], result["dead_experts"]
        (violation,), (loss,) = result["max_violation"], result["task_loss"]
        (row,) = re.findall(rf"^ {re.escape(name)}  .*$", output, re.MULTILINE)
        shown = ["no" if steps is None else str(steps), f"{violation:.2f}", f"{dead:.1f}"]
        assert row.split()[1:] == [*shown, f"{loss:.2f}"]
        # The numbers are the end of the curves, which are rounded to four digits.
        end = [step > 0.9 * STEPS for step in written["steps_at_records"]]
        for curve, value in (("max_violation", violation), ("task_loss", loss)):
            values = np.array(result["curves"][curve][0])
            assert values[end].mean() == pytest.approx(value, rel=1e-3)
    assert f"\nrecovered: {', '.join(RECOVERING)}\nnot recovered: {CONTROL}\n" in output


@pytest.mark.study
def test_figure(trained: tuple[str, Path]) -> None:
    assert (trained[1] / "balance.png").stat().st_size > 10_000


def test_runs_every_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--steps", "3", "--seeds", "2", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    written = read(tmp_path)
    assert list(written["results"]) == list(METHODS)
    for name in COLLAPSED:
        assert written["results"][name]["max_violation"] == [3, 3]
    assert "1" in written["results"]["next_best"]["arguments"]["capacity"]
    # Two experts keep a quarter. Few slots are dropped: the last ones find room at experts only
    # that the token has already.
    assert written["results"]["next_best"]["rerouted_share"] == pytest.approx([0.75] * 2, abs=0.01)
    assert written["results"]["selection_bias"]["rerouted_share"] == [0, 0]
    assert "next_best: 75% of the slots are still rerouted at the end" in output
    assert "…" not in output  # the table fits where nobody says how wide the terminal is
    assert (tmp_path / "balance.png").stat().st_size > 10_000


def test_same_seed_same_numbers() -> None:
    first, again, other = (
        experiment.train("selection_bias", seed, 5, experiment.LR, lambda: None)
        for seed in (0, 0, 1)
    )
    assert first.loss.tolist() == again.loss.tolist() != other.loss.tolist()


@pytest.mark.parametrize(
    "option",
    ["--methods magic", "--steps 0", "--steps 1.5", "--seeds 0", "--lr nan", "--lr 0", "--quick"],
)
def test_refuses(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, program.main, "--out", str(tmp_path), *option.split()).err
    assert error.startswith("python -m studies.balance: error: ")
    assert option.split()[0] in error


def test_a_loss_that_is_not_finite_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = experiment.Task.batch

    def infinite(task: experiment.Task) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, target = batch(task)
        return tokens, target * torch.inf

    monkeypatch.setattr(experiment.Task, "batch", infinite)
    arguments = ["--steps", "1", "--lr", "2", "--out", str(tmp_path)]
    assert refused(capsys, program.main, *arguments).err.startswith(
        "python -m studies.balance: error: --lr must be lower, got 2: the loss of control is "
    )


def test_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "train", interrupted)
    assert program.main(["--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\ninterrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


# ---- the experiment


@pytest.mark.parametrize("seed", range(3))
def test_starts_collapsed_and_the_same_for_all(seed: int) -> None:
    tokens, _ = experiment.Task(seed).batch()
    layers = {name: experiment.make_layer(METHODS[name], seed) for name in METHODS}
    control = dict(layers[CONTROL].named_parameters())
    for name in COLLAPSED:
        routing = layers[name](tokens).routing
        assert torchmoe.routing_statistics(routing).max_violation == EXPERTS / TOP_K - 1
        assert set(routing.selected.unique().tolist()) == set(range(TOP_K))
        parameters = dict(layers[name].named_parameters())
        assert parameters.keys() == control.keys()
        assert all(torch.equal(parameters[key], control[key]) for key in control)
    healthy = torchmoe.routing_statistics(layers[HEALTHY](tokens).routing)
    assert healthy.max_violation < experiment.BOUND
    assert healthy.dead_experts == 0


def test_methods_differ_in_nothing_but_arguments_of_the_layer() -> None:
    assert METHODS[CONTROL].arguments == METHODS[HEALTHY].arguments == {}
    told_apart = [repr(METHODS[name].arguments) for name in COLLAPSED]
    assert len(set(told_apart)) == len(told_apart)
    for name in COLLAPSED:
        routing = experiment.make_layer(METHODS[name], 0)(torch.randn(4, 8, experiment.HIDDEN_SIZE))
        weighted = routing.aux_loss.item()
        given = METHODS[name].arguments.get("balance", Balance(0))
        assert (weighted != 0) == bool(given.weight or given.losses)


def test_the_loss_of_the_common_function_alone_is_1() -> None:
    task = experiment.Task(0)
    errors, targets = [], []
    for _ in range(20):
        tokens, target = task.batch()
        assert (tokens[..., 0] == 1).all()
        known = (1 - experiment.OWN_SHARE) ** 0.5 * tokens[..., 1:] @ task.common
        errors.append((target - known).square().mean().item() / experiment.OWN_SHARE)
        targets.append(target.var().item())
    # Both are means of squares: 20 batches of 512 tokens have 320,000 numbers, 16 own functions
    # 16,000, the common one 1,000, whose relative deviation, sqrt(2 / 1000), is the largest.
    assert np.mean(errors) == pytest.approx(1, rel=0.05)
    assert np.mean(targets) == pytest.approx(1, rel=0.2)


# ---- numbers


def make_run(violation: list[float], loss: float) -> Run:
    count = len(violation)
    zeros = np.zeros(count)
    steps = np.arange(1.0, count + 1) * 40
    return Run(steps, np.array(violation), zeros, zeros, np.full(count, loss))


def test_recovery() -> None:
    control = make_run([3.0] * 20, 0.8)
    better = 0.7
    assert make_run([3.0] * 5 + [0.9] * 15, better).recovery(control) == 200
    assert make_run([0.9] * 20, better).recovery(control) == 0
    assert make_run([3.0] * 5 + [0.9] * 15, 0.8).recovery(control) is None  # no better
    # The last time above the bound counts, and at the bound is not below.
    assert make_run([3.0, 0.9, 0.9, 1.0] + [0.9] * 16, better).recovery(control) == 160
    # It must hold for a tenth of the steps, here two records.
    assert make_run([3.0] * 18 + [0.9] * 2, better).recovery(control) == 720
    assert make_run([3.0] * 19 + [0.9], better).recovery(control) is None
    assert control.recovery(control) is None


def test_numbers_at_the_end_are_means_of_a_tenth() -> None:
    run = make_run([3.0] * 18 + [0.5, 0.7], 1.0)
    assert run.at_end(run.violation) == pytest.approx(0.6)
    alone = make_run([0.5], 1.0)
    assert alone.at_end(alone.violation) == 0.5


def test_a_method_that_recovers_with_some_seeds_is_shown_as_such() -> None:
    control = make_run([3.0] * 20, 0.8)
    good, bad = make_run([3.0] * 5 + [0.5] * 15, 0.4), make_run([1.5] * 20, 0.4)
    runs = {
        CONTROL: [control] * 2,
        "load_balancing:batch": [good] * 2,
        "importance+load": [good, bad],
        "mutual_information": [bad] * 2,
    }
    results = {name: report.summary(name, runs) for name in runs}
    assert report.verdict(results) == [
        "recovered: load_balancing:batch",
        "recovered with some seeds: importance+load",
        f"not recovered: {CONTROL}, mutual_information",
    ]
    cells = {
        name: report.recovery_cells(name, r["recovered_after_steps"]) for name, r in results.items()
    }
    assert cells["load_balancing:batch"] == ("200", "200-200")
    assert cells["importance+load"] == ("1 of 2", "")
    assert cells["mutual_information"] == cells[CONTROL] == ("no", "")
    assert report.recovery_cells(HEALTHY, [0, 0]) == ("", "")
