"""The training program as a whole: what it prints, keeps and refuses, and how it goes on."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train_lm
from lm_runs import LINE, assert_same, fails, held_out, run, tensors
from train_lm import ByteLM
from training import checkpoint
from training.batches import next_batch
from training.corpus import Text
from training.language_model import LanguageModel, LMOutput
from training.parallel import Processes
from training.run_folder import RunFolder
from training.settings import Settings

# ---- the file


def test_is_read_over_lunch() -> None:
    """The model, the loss and the loop are in one file of at most 300 lines."""
    source = Path(train_lm.__file__).read_text()
    assert len(source.splitlines()) <= 300
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").partition(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "torchmoe", "training"}


def test_no_model_is_in_the_package_around_it() -> None:
    """But for the interface that it has for one."""
    files = sorted((Path(train_lm.__file__).parent / "training").glob("*.py"))
    modules = {
        value
        for path in files
        for value in vars(importlib.import_module(f"training.{path.stem}")).values()
        if inspect.isclass(value)
        and issubclass(value, torch.nn.Module)
        and value.__module__.startswith("training")
    }
    assert modules == {LanguageModel}


# ---- a run


def test_prints_what_the_run_does(trained: tuple[str, Path]) -> None:
    output, _ = trained
    lines = LINE.findall(output)
    assert len(lines) == 25
    assert [int(line[0]) for line in lines] == sorted(int(line[0]) for line in lines)
    assert int(lines[-1][0]) == 60
    losses = [float(line[1]) for line in lines]
    assert 7 < losses[0] < 9  # eight bits per byte where nothing is known
    assert losses[-1] < 4.5
    assert all(0.9 <= float(line[3]) <= 4 for line in lines)
    assert all(float(line[4]) == float(line[5]) == 0 for line in lines)  # no capacity
    assert all(0 <= float(line[6]) <= 3 for line in lines)
    assert all(0 <= int(line[7]) <= 4 for line in lines)  # top 2 of 4 in 2 layers
    assert output.count("\nsample, ") == 2
    assert "\x1b" not in output  # no colours, no cursor moves where there is no terminal


def test_prints_held_out_loss_per_domain_beside_n_grams(trained: tuple[str, Path]) -> None:
    rows = held_out(trained[0])
    assert list(rows) == ["notes", "sums.txt", "mean"]
    for column in range(4):
        mean = (rows["notes"][column] + rows["sums.txt"][column]) / 2
        assert rows["mean"][column] == pytest.approx(mean, abs=1e-4)
    assert rows["mean"][0] < 5
    assert rows["notes"][1] < rows["notes"][3] < 2  # ten words: longer contexts tell more


def test_leaves_everything_in_its_folder(trained: tuple[str, Path]) -> None:
    output, out = trained
    names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    events = [name for name in names if name.startswith("tensorboard/")]
    assert len(events) == 1
    figures = [
        f"figures/{n}.{kind}"
        for n in ("expert_load", "expert_load_by_step", "loss", "specialization")
        for kind in ("png", "svg")
    ]
    steps = [f"checkpoints/step-000000{n}.safetensors" for n in (40, 60)]
    assert names == sorted([*events, *figures, *steps, "metrics.jsonl", "results.json", "run.json"])
    for name in figures:
        assert f"figure: {out / name}" in output
        if name.endswith("svg"):
            ElementTree.parse(out / name)


def test_saves_settings_versions_and_revision(trained: tuple[str, Path], data: list[str]) -> None:
    described = json.loads((trained[1] / "run.json").read_text())
    assert described["settings"]["layers"] == 2
    assert described["settings"]["data"] == data
    assert described["settings"]["lr"] == 3e-3
    assert described["torch"] == torch.__version__
    assert described["torchmoe"]["torchmoe"]
    assert re.fullmatch(r"[0-9a-f]{7,}(-changed)?|unknown", described["git_revision"])


def test_results_are_what_is_printed(trained: tuple[str, Path]) -> None:
    output, out = trained
    results = json.loads((out / "results.json").read_text())
    rows = held_out(output)
    for name, row in rows.items():
        columns = [results["bits_per_byte"], *(results["ngram_bits_per_byte"][n] for n in "543")]
        assert [round(column[name], 4) for column in columns] == row
    assert results["steps"] == 60
    assert results["bytes"] == 60 * 256
    assert 0 < results["training_seconds"] <= results["seconds"]
    kinds = {(one["kind"], one["layer"]) for one in results["specialization"]}
    assert kinds == {(kind, layer) for kind in ("byte class", "domain") for layer in (0, 1)}


def test_metrics_tell_the_run(trained: tuple[str, Path]) -> None:
    records = [json.loads(line) for line in (trained[1] / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(2, 61, 2))
    assert [record["step"] for record in records if record["held_out"]] == [20, 40, 60]
    for record in records:
        assert [len(layer) for layer in record["load"]] == [4, 4]
        assert all(sum(layer) == pytest.approx(1) for layer in record["load"])
        assert record["dropped"] == record["rerouted"] == [0, 0]
        busiest = [4 * max(layer) - 1 for layer in record["load"]]  # of both steps together
        assert all(a >= b - 1e-6 for a, b in zip(record["max_violation"], busiest, strict=True))
        assert record["dead"] == [layer.count(0) for layer in record["load"]]
        assert set(record["domain_loss"]) == {"notes", "sums.txt"}
    rates = [record["lr"] for record in records]
    assert 2.8e-3 < max(rates) <= 3e-3  # the cosine has begun when the warm-up ends
    assert rates[-1] == pytest.approx(3e-4, rel=0.02)


def test_same_seed_same_run(
    trained: tuple[str, Path], tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*tiny, "--steps", "60", "--checkpoint-every", "20"]
    for seed in ("0", "1"):
        assert train_lm.main([*options, "--seed", seed, "--out", str(tmp_path / seed)]) == 0
    capsys.readouterr()
    assert_same(trained[1], tmp_path / "0")
    with pytest.raises(AssertionError):
        assert_same(trained[1], tmp_path / "1")


def test_capacity_drops_in_training_only(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*tiny, "--steps", "3", "--capacity-factor", "0.5", "--out", str(tmp_path)]
    assert train_lm.main(options) == 0
    lines = LINE.findall(capsys.readouterr().out)
    # 8 windows of 32 bytes, twice each, over 4 experts that take ceil(0.5 * 512 / 4) = 64.
    assert len(lines) == 3
    assert all(50 <= float(line[4]) < 100 for line in lines)
    model = ByteLM(Settings(experts=4, top_k=2, capacity_factor=0.5).model())
    text = torch.arange(64).view(1, 64)
    assert torch.equal(*kept_and_wanted(model.eval()(text)))
    assert not torch.equal(*kept_and_wanted(model.train()(text)))


def kept_and_wanted(output: LMOutput) -> tuple[Tensor, Tensor]:
    return (
        torch.stack([routing.kept_per_expert for routing in output.routings]),
        torch.stack([routing.tokens_per_expert for routing in output.routings]),
    )


def test_order_of_capacity_reaches_the_layer() -> None:
    model = ByteLM(Settings(capacity_factor=1.0, order="token").model())
    assert all(moe.capacity.order == "token" for moe in model.moes if moe.capacity)
    assert len(model.moes) == 4


def test_overflow_reroutes_instead_of_dropping(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*tiny, "--steps", "3", "--capacity-factor", "1", "--out", str(tmp_path)]
    assert train_lm.main([*options, "--overflow", "next_best"]) == 0
    lines = LINE.findall(capsys.readouterr().out)
    # There is as much room as there are slots: one is dropped only where the experts with room
    # serve its byte already.
    dropped, rerouted = ([float(line[column]) for line in lines] for column in (4, 5))
    assert max(dropped) < 5
    assert min(rerouted) > 0


@pytest.mark.parametrize(("balance", "weight"), [("loss", 0.01), ("bias", 0), ("none", 0)])
def test_balance_reaches_the_layer(balance: str, weight: float) -> None:
    model = ByteLM(Settings(layers=1, balance=balance).model())
    output = model(torch.arange(64).view(1, 64))
    model.update(output.routings)
    (moe,), (routing,) = model.moes, output.routings
    balancing = routing.losses["load_balancing_loss"].item()
    assert output.aux_loss.item() == pytest.approx(weight * balancing)
    load, bias = routing.tokens_per_expert, moe.selection_bias
    if balance == "bias":
        assert bias is not None
        assert torch.equal(bias.sign(), (load.double().mean() - load).sign().float())
    else:
        assert bias is None


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_dense_model_has_the_active_parameters_of_the_experts(shared: int) -> None:
    moe, dense = (
        ByteLM(Settings(feed_forward=kind, shared_experts=shared).model())
        for kind in ("moe", "dense")
    )
    total, active = moe.count_parameters()
    routers = sum(layer.get_submodule("router").weight.numel() for layer in moe.moes)
    assert dense.count_parameters() == (active - routers, active - routers)
    layers, expert = len(moe.moes), 3 * 128 * 256  # the matrices of one
    assert total - active == layers * 6 * expert  # of 8, two of which work
    assert [layer.shared_experts is None for layer in moe.moes] == [shared == 0] * layers
    output = dense(torch.zeros(1, 8, dtype=torch.int64))
    assert output.routings == []
    assert float(output.aux_loss) == 0


@pytest.mark.whole_report
def test_dense_run_has_no_figures_of_experts(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*tiny, "--steps", "5", "--feed-forward", "dense", "--out", str(tmp_path)]
    assert train_lm.main(options) == 0
    assert "expert tells" not in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["loss.png", "loss.svg"]


def test_stops_by_the_clock(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_lm.main([*tiny, "--minutes", "0.01", "--out", str(tmp_path)]) == 0
    clock = LINE.findall(capsys.readouterr().out)[-1][-1]
    assert clock in ("0:00", "0:01")
    assert checkpoint.load(tmp_path).progress.seconds >= 0.6
    assert train_lm.main(["--resume", "--out", str(tmp_path)]) == 0


def test_a_new_run_sets_the_files_of_an_earlier_one_aside(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps in ("2", "3"):
        assert train_lm.main([*tiny, "--steps", steps, "--out", str(tmp_path)]) == 0
    assert (
        f"the files of an earlier run are in {tmp_path / 'earlier-1'} now"
        in capsys.readouterr().out
    )
    assert checkpoint.load(tmp_path).progress.step == 3
    assert checkpoint.load(tmp_path / "earlier-1").progress.step == 2
    assert (tmp_path / "earlier-1" / "results.json").exists()


# ---- starting from trained weights


def test_checkpoint_gives_the_same_numbers_and_sample(trained: tuple[str, Path]) -> None:
    output, out = trained
    for path in (out, out / "checkpoints", out / "checkpoints" / "step-00000060.safetensors"):
        again = run("--load", str(path), "--threads", "1")
        assert again.returncode == 0, again.stderr
        report = again.stdout.split("\nheld-out bits")[1]
        assert output.split("\nheld-out bits")[1].startswith(report)
        assert not LINE.search(again.stdout)


def test_trains_on_from_a_checkpoint(
    trained: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, out = trained
    options = ["--load", str(out), "--threads", "1", "--steps", "20", "--out", str(tmp_path)]
    assert train_lm.main(options) == 0
    after = capsys.readouterr().out
    assert [int(line[0]) for line in LINE.findall(after)] == list(range(61, 81))
    assert held_out(after)["mean"][0] < held_out(before)["mean"][0]
    found = checkpoint.load(tmp_path)
    assert (found.settings.layers, found.settings.context) == (2, 32)
    assert (found.progress.first_step, found.progress.step) == (60, 80)


def test_refuses_other_sizes_than_the_checkpoints(
    trained: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails(capsys, "--load", str(trained[1]), "--layers", "3")
    assert "--layers is 2 in the checkpoint and cannot change, got 3" in error
    assert train_lm.main(["--load", str(trained[1]), "--layers", "2", "--threads", "1"]) == 0


# ---- parts


def text_of(data: list[str]) -> Text:
    return Text.load(data)


def test_each_step_has_its_own_windows_whatever_was_drawn_before(data: list[str]) -> None:
    text, settings = text_of(data), Settings(batch_tokens=256, context=32)
    first = next_batch(text, 3, settings, Processes())
    torch.rand(100)
    second = next_batch(text, 3, settings, Processes())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = next_batch(text, 4, settings, Processes())
    assert not torch.equal(first[0], other[0])
    inputs, targets, domains = first
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert domains.tolist() == [0, 1] * 4
    for window, domain in zip(inputs, domains, strict=True):
        assert bytes(window.tolist()) in bytes(list(text.train.values())[domain].tolist())


def test_processes_share_a_batch_row_by_row(data: list[str]) -> None:
    text, settings = text_of(data), Settings(batch_tokens=256, context=32)
    whole = next_batch(text, 3, settings, Processes())
    parts = [next_batch(text, 3, settings, Processes(rank, 4)) for rank in range(4)]
    for column in range(3):
        assert torch.equal(whole[column], torch.cat([part[column] for part in parts]))


def test_learning_rate_warms_up_and_follows_a_cosine() -> None:
    settings = replace(Settings(), steps=1000, lr=1.0)
    job = train_lm.new_job(settings)

    def rate(step: int) -> float:
        job.progress.step = step
        return train_lm.learning_rate(job, job.share)

    assert rate(0) == pytest.approx(1 / 101, rel=0.01)
    assert rate(100) == pytest.approx(0.1 + 0.9 * (1 + 0.951) / 2, rel=0.001)
    assert rate(500) == pytest.approx(0.55)
    assert rate(1000) == pytest.approx(0.1)


def test_folder_of_a_run_is_found_again_after_it_moved(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_lm.main([*tiny, "--steps", "2", "--out", str(tmp_path / "here")]) == 0
    (tmp_path / "here").rename(tmp_path / "there")
    assert train_lm.main(["--resume", "--out", str(tmp_path / "there")]) == 0
    assert not RunFolder(tmp_path / "here").path.exists()
    assert "this run is over" in capsys.readouterr().out


@pytest.mark.slow
# torch reads .grad of what is no leaf where a graph goes on behind the watcher's hook
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_compiled_steps_are_those_of_the_plain_model(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        options = [*tiny, "--steps", "4", "--dtype", "float64", *more]
        assert train_lm.main([*options, "--out", str(tmp_path / name)]) == 0
    capsys.readouterr()
    plain, compiled = tensors(tmp_path / "plain"), tensors(tmp_path / "compiled")
    for name in plain:
        torch.testing.assert_close(plain[name], compiled[name], rtol=1e-6, atol=1e-9)
