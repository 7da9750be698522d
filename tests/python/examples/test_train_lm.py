"""The main job: what it prints, what it keeps and what it refuses."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import train_lm
from lm import checkpoint
from lm.settings import Settings, SettingsError

SCRIPT = train_lm.__file__
TINY = [
    *("--layers", "2", "--hidden-size", "32", "--intermediate-size", "16", "--experts", "4"),
    *("--batch-tokens", "256", "--context", "32", "--threads", "1"),
]
LINE = re.compile(r"^ *(\d+)  +([\d.]+)  +(\d+)  +([\d.]+)  +([\d.]+)%  +(\d+:\d\d)$", re.MULTILINE)
HELD_OUT = re.compile(r"^held-out bits per byte.*?(?=^$)", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two domains: a folder of files, and one file."""
    folder = tmp_path_factory.mktemp("data")
    words = ["moon", "rose", "over", "quiet", "hills", "while", "seven", "grey", "wolves", "sang"]
    draw = random.Random(0)
    (folder / "notes").mkdir()
    for name in "abcdefgh":
        text = " ".join(draw.choice(words) for _ in range(400))
        (folder / "notes" / f"{name}.txt").write_text(text)
    (folder / "sums.txt").write_text("\n".join(f"{n}+{n}={2 * n}" for n in range(600)))
    (folder / "notes" / "picture.png").write_bytes(b"\x89PNG\0\xff" * 100)
    return [str(folder / "notes"), str(folder / "sums.txt")]


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    """Gives the process its number of threads back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script as a user starts it."""
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="session")
def trained(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The output of a short run, and its checkpoint."""
    out = tmp_path_factory.mktemp("out") / "new" / "folder"
    result = run(*TINY, "--data", *data, "--steps", "60", "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout, str(out / "model.safetensors")


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr with which the program refuses, inside this process for speed."""
    with pytest.raises(SystemExit) as exit_info:
        train_lm.main(list(arguments))
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("train_lm.py: error: ")
    return error


# ---- a run


def test_prints_what_the_run_does(trained: tuple[str, str]) -> None:
    output, path = trained
    lines = LINE.findall(output)
    assert len(lines) == train_lm.LINES
    assert [int(line[0]) for line in lines] == sorted(int(line[0]) for line in lines)
    assert int(lines[-1][0]) == 60
    losses = [float(line[1]) for line in lines]
    assert 7 < losses[0] < 9  # eight bits per byte where nothing is known
    assert losses[-1] < 4.5
    assert all(0.9 <= float(line[3]) <= 4 for line in lines)
    assert all(float(line[4]) == 0 for line in lines)
    assert f"checkpoint after 60 steps: {path}" in output
    assert Path(path).is_file()
    assert output.count("\nsample, ") == 2


def test_prints_held_out_loss_per_domain_and_mean(trained: tuple[str, str]) -> None:
    rows = re.findall(r"^  (\S+) +([\d.]+)$", held_out(trained[0]), re.MULTILINE)
    assert [name for name, _ in rows] == ["notes", "sums.txt", "mean"]
    notes, sums, mean = (float(value) for _, value in rows)
    assert mean == pytest.approx((notes + sums) / 2, abs=1e-4)
    assert mean < 5


def held_out(output: str) -> str:
    match = HELD_OUT.search(output)
    assert match is not None
    return match[0]


def test_checkpoint_gives_the_same_numbers_and_sample(trained: tuple[str, str]) -> None:
    output, path = trained
    again = run("--load", path, "--threads", "1")
    assert again.returncode == 0, again.stderr
    assert again.stdout.split("\nheld-out bits")[1] == output.split("\nheld-out bits")[1]
    assert not LINE.search(again.stdout)


def test_trains_on_from_a_checkpoint(
    trained: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, path = trained
    load = ["--load", path, "--threads", "1"]
    assert train_lm.main([*load, "--steps", "20", "--out", str(tmp_path)]) == 0
    after = capsys.readouterr().out
    assert [int(line[0]) for line in LINE.findall(after)] == list(range(61, 81))
    assert "checkpoint after 80 steps" in after
    assert mean_loss(after) < mean_loss(before)
    weights, settings, steps = checkpoint.load(tmp_path / "model.safetensors")
    assert (settings.layers, settings.context, steps) == (2, 32, 80)
    assert weights["blocks.0.moe.experts.down_proj"].shape == (4, 32, 16)


def mean_loss(output: str) -> float:
    return float(held_out(output).split()[-1])


def test_same_seed_same_run(
    data: list[str],
    trained: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def numbers(output: str) -> str:
        """The output without speed, time and path."""
        lines = LINE.sub(lambda match: " ".join(match.group(1, 2, 4, 5)), output)
        return re.sub(r"checkpoint after.*", "", lines)

    outputs = []
    for seed in ("0", "1"):
        arguments = [*TINY, "--data", *data, "--steps", "60", "--out", str(tmp_path)]
        assert train_lm.main([*arguments, "--seed", seed]) == 0
        outputs.append(numbers(capsys.readouterr().out))
    assert outputs[0] == numbers(trained[0])
    assert outputs[1] != numbers(trained[0])


def test_capacity_drops_in_training_only(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TINY, "--data", *data, "--steps", "3", "--out", str(tmp_path)]
    assert train_lm.main([*arguments, "--capacity-factor", "0.5"]) == 0
    lines = LINE.findall(capsys.readouterr().out)
    # 8 windows of 32 bytes, twice each, over 4 experts that take ceil(0.5 * 512 / 4) = 64.
    assert all(50 <= float(line[4]) < 100 for line in lines)
    model = train_lm.ByteLM(Settings(experts=4, top_k=2, capacity_factor=0.5).model())
    text = torch.arange(64).view(1, 64)
    assert torch.equal(*kept_and_wanted(model.eval()(text)))
    assert not torch.equal(*kept_and_wanted(model.train()(text)))


def kept_and_wanted(output: train_lm.LMOutput) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.stack([routing.kept_per_expert for routing in output.routings]),
        torch.stack([routing.tokens_per_expert for routing in output.routings]),
    )


def test_stops_by_the_clock(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_lm.main([*TINY, "--data", *data, "--minutes", "0.01", "--out", str(tmp_path)]) == 0
    assert train_lm.main(["--load", str(tmp_path / "model.safetensors")]) == 0
    clock = LINE.findall(capsys.readouterr().out)[-1][5]
    assert clock in ("0:00", "0:01")


@pytest.mark.skipif(os.name == "nt", reason="signals as POSIX has them")
def test_ctrl_c_saves(data: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-u", SCRIPT, *TINY]
    command += ["--data", *data, "--minutes", "60", "--steps", "100000", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("  step"):
                break
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--load {tmp_path / 'model.safetensors'}" in output
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    checkpoint.load(tmp_path / "model.safetensors")


def test_model_is_causal_and_sees_no_further_than_its_context() -> None:
    model = train_lm.ByteLM(Settings(hidden_size=32, context=16).model()).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # a new model gives every byte the same odds
    text = torch.randint(256, (1, 16))
    changed = text.clone()
    changed[0, 9:] = 0
    before, after = model(text).logits, model(changed).logits
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


# ---- what it refuses


def test_help_names_every_option_with_its_default() -> None:
    result = run("--help")
    assert result.returncode == 0
    text = " ".join(result.stdout.split())
    for name, default in vars(Settings()).items():
        assert f"--{name.replace('_', '-')} " in text
        assert default in (None, ()) or f"(default {default})" in text
    assert "examples:" in text


def test_error_is_one_line_without_traceback() -> None:
    result = run("--top-k", "9")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "train_lm.py: error: --top-k must be at most --experts (8), got 9 "
        "(--help lists the options)\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--layers 0", "--layers: must be a whole number from 1 to 256, got '0'"),
        ("--layers two", "--layers: must be a whole number from 1 to 256, got 'two'"),
        ("--lr nan", "--lr: must be a number from 1e-09 to 10.0, got 'nan'"),
        ("--minutes 0", "--minutes: must be a number from 0.01 to"),
        ("--capacity-factor -1", "--capacity-factor"),
        ("--estimator magic", "(?=.*'magic')(?=.*exact)(?=.*straight_through)"),
        ("--hidden-size 100", "--hidden-size must be a multiple of 32, got 100"),
        ("--experts 2 --top-k 3", r"--top-k must be at most --experts \(2\), got 3"),
        ("--batch-tokens 64", r"--batch-tokens must be at least --context \(128\), got 64"),
        ("--step 5", "unrecognized arguments: --step 5"),
        ("--data {tmp}/nowhere", "--data: .*/nowhere: no such file or folder"),
        ("--data {tmp}/empty", "--data: .*/empty holds no text"),
        ("--data {tmp}/empty.txt", r"--data: .*/empty\.txt holds no text"),
        ("--data {tmp}/binary", "--data: .*/binary holds no text"),
        ("--data {tmp}/short.txt", "short.txt: --context 128 needs more text than 90 bytes"),
        ("--data {tmp}/short.txt {tmp}/short.txt", "--data must name each path once"),
        ("--out {tmp}/short.txt/out", "--out: cannot write to .*short.txt/out: "),
        ("--load {tmp}/nowhere", "--load: .*/nowhere: no such file"),
        ("--load {tmp}", "--load: .* is not a safetensors file"),
        ("--load {tmp}/short.txt", "--load: .*short.txt is not a safetensors file"),
        ("--load {tmp}/foreign", "--load: .*foreign is not a checkpoint of this program"),
    ],
)
def test_refuses(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("x" * 100)
    (tmp_path / "binary").write_bytes(b"\0" * 1000)
    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign")
    given = arguments.replace("{tmp}", str(tmp_path)).split()
    if "--out" not in given:
        given += ["--out", str(tmp_path / "out")]
    assert re.search(message, fails(capsys, *given))


def test_refuses_other_sizes_than_the_checkpoints(
    trained: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails(capsys, "--load", trained[1], "--layers", "3")
    assert "--layers is 2 in the checkpoint and cannot change, got 3" in error
    assert train_lm.main(["--load", trained[1], "--layers", "2", "--threads", "1"]) == 0


def test_refuses_to_go_on_without_a_loss() -> None:
    model = train_lm.ByteLM(Settings().model())
    torch.nn.init.constant_(model.head.weight, float("nan"))
    meter = train_lm.Meter()
    text = torch.zeros(1, 8, dtype=torch.int64)
    output = model(text)
    meter.add(train_lm.task_loss(output.logits, text), output, 8)
    with pytest.raises(SettingsError, match="the loss is nan at step 7: --lr must be lower"):
        meter.line(7, 1.0)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.99, 0.999999])
def test_refuses_a_torn_checkpoint(trained: tuple[str, str], share: float, tmp_path: Path) -> None:
    whole = Path(trained[1]).read_bytes()
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(checkpoint.CheckpointError, match=r"torn\.safetensors is not a safetensors"):
        checkpoint.load(torn)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("settings", "{"),
        ("settings", "[]"),
        ("settings", "{}"),
        ("settings", '{"layers": 2}'),
        ("steps_done", "many"),
    ],
)
def test_refuses_damaged_settings(key: str, value: str, tmp_path: Path) -> None:
    metadata = {"format": checkpoint.FORMAT, "settings": Settings().to_json(), "steps_done": "1"}
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata)
    assert checkpoint.load(path)[1] == Settings()
    save_file({"x": torch.zeros(1)}, path, {**metadata, key: value})
    with pytest.raises(checkpoint.CheckpointError, match="has damaged settings"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("name", "value"), [("layers", 0), ("top_k", 9), ("estimator", "magic"), ("lr", "fast")]
)
def test_refuses_a_saved_value_that_is_not_allowed(name: str, value: object) -> None:
    text = Settings().to_json()
    before = f'"{name}": {Settings().__dict__[name]}'.replace("exact", '"exact"')
    assert before in text
    with pytest.raises(SettingsError, match="must be"):
        Settings.from_json(text.replace(before, f'"{name}": "{value}"'))


def test_refuses_weights_that_do_not_fit() -> None:
    model = train_lm.ByteLM(Settings(layers=1).model())
    weights = dict(model.state_dict())
    del weights["head.weight"]
    with pytest.raises(checkpoint.CheckpointError, match="other weights than its settings ask for"):
        checkpoint.fill(model, weights, "model.safetensors")


def test_a_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, {"x": torch.zeros(1)}, Settings(), 1)

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(checkpoint.CheckpointError, match="No space left on device"):
        checkpoint.save(path, {"x": torch.ones(1)}, Settings(), 2)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert checkpoint.load(path)[2] == 1
