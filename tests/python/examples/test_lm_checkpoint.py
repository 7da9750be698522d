"""Checkpoints: whole or not at all, told from damaged and foreign files, never half loaded."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import train_lm
from train_lm import ByteLM
from training import checkpoint, run_folder
from training.checkpoint import CheckpointError, Progress
from training.settings import Settings

SETTINGS = Settings(layers=1, hidden_size=32, intermediate_size=8, experts=2, top_k=1, context=8)


def new_model(seed: int = 0) -> tuple[ByteLM, torch.optim.Optimizer]:
    """A model that has made one step, and its optimizer."""
    torch.manual_seed(seed)
    model = ByteLM(SETTINGS.model())
    optimizer = train_lm.make_optimizer(model, 1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def save(folder: Path, step: int = 7, seed: int = 0) -> Path:
    model, optimizer = new_model(seed)
    progress = Progress(step=step, bytes=80, training_seconds=1.5)
    return checkpoint.save(folder, model, optimizer, SETTINGS, progress, {"torch": "some"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as it should be."""
    return save(tmp_path_factory.mktemp("whole"))


def state(model: ByteLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return {**tensors, **checkpoint.optimizer_tensors(optimizer)}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- whole ones


def test_gives_everything_back(whole: Path) -> None:
    found = checkpoint.load(whole)
    assert found.settings == SETTINGS
    assert found.progress == Progress(step=7, bytes=80, training_seconds=1.5)
    model, optimizer = new_model(seed=1)
    checkpoint.restore_model(found, model)
    checkpoint.restore_optimizer(found, optimizer)
    assert_same(state(model, optimizer), state(*new_model(seed=0)))
    assert optimizer.state_dict()["param_groups"][1]["weight_decay"] == 0.0


def test_takes_the_scalar_temperature_of_older_files(tmp_path: Path) -> None:
    settings = replace(SETTINGS, router="cosine")

    def stepped(shape: list[int]) -> tuple[ByteLM, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = ByteLM(settings.model())
        router = model.blocks[0].feed_forward.router
        router.log_temperature = nn.Parameter(router.log_temperature.detach().reshape(shape))
        optimizer = train_lm.make_optimizer(model, 1e-3)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return model, optimizer

    progress = Progress(step=7, bytes=80, training_seconds=1.5)
    path = checkpoint.save(tmp_path, *stepped([]), settings, progress, {"torch": "some"})
    found = checkpoint.load(path)
    model, optimizer = stepped([1])
    expected = {name: tensor.clone() for name, tensor in state(model, optimizer).items()}
    optimizer.step()
    checkpoint.restore_model(found, model)
    checkpoint.restore_optimizer(found, optimizer)
    assert_same(state(model, optimizer), expected)
    optimizer.step()


def test_is_plain_safetensors_with_json_that_tells_where_it_comes_from(whole: Path) -> None:
    with safe_open(whole, "pt") as file:
        content = file.metadata()
    assert json.loads(content["settings"])["hidden_size"] == 32
    assert json.loads(content["origin"]) == {"torch": "some"}
    assert "model.blocks.0.feed_forward.experts.down_proj" in load_file(whole)


def test_keeps_the_last_two_named_by_step(tmp_path: Path) -> None:
    for step in (5, 100, 12, 99_999_999, 123_456_789):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-123456789.safetensors",
        "step-99999999.safetensors",
    ]
    assert checkpoint.load(tmp_path).progress.step == 123_456_789


def test_finds_the_newest_of_a_run(tmp_path: Path) -> None:
    folder = run_folder.RunFolder(tmp_path)
    folder.make()
    save(folder.checkpoints, 5)
    save(folder.checkpoints, 12)
    (folder.checkpoints / "step-00000099.safetensors.unfinished").write_bytes(b"torn")
    (folder.checkpoints / "step-99.safetensors").write_bytes(b"not named by this program")
    assert checkpoint.load(tmp_path).path == folder.checkpoints / "step-00000012.safetensors"


def test_size_is_told_before_it_is_written(whole: Path) -> None:
    size = whole.stat().st_size
    assert size <= checkpoint.size_of(new_model()[0]) <= size + (2 << 20)


def test_weights_of_another_dtype_are_converted(whole: Path) -> None:
    settings = replace(SETTINGS, dtype="float64", batch_tokens=8)
    job = train_lm.new_job(settings, checkpoint.load(whole))
    weight = job.model.head.weight
    assert weight.dtype == torch.float64
    assert torch.equal(weight.float(), new_model()[0].head.weight)


# ---- no room


def no_room(_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(tmp_path, 1)
    before = first.read_bytes()
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(CheckpointError, match=r"--out: cannot write .*00000002.*No space left"):
        save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [first]
    assert first.read_bytes() == before


def test_the_older_of_two_makes_room_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    fsync = os.fsync

    def full_with_two(file: int) -> None:
        if len(checkpoint.in_order(tmp_path)) == 2:
            no_room(file)
        fsync(file)

    monkeypatch.setattr(os, "fsync", full_with_two)
    with pytest.raises(CheckpointError):  # the folder's own fsync sees two again
        save(tmp_path, 3)
    assert [path.name[-13:-12] for path in checkpoint.in_order(tmp_path)] == ["2", "3"]


# ---- damaged and foreign ones


def header_size(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def flip(data: bytes, place: int, mask: int = 1) -> bytes:
    return data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]


def in_header(find: bytes, put: bytes) -> Callable[[bytes], bytes]:
    """Changes text of equal length in the header."""

    def change(data: bytes) -> bytes:
        assert len(find) == len(put)
        assert find in data[: header_size(data)]
        return data.replace(find, put, 1)

    return change


def pickled(_: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, buffer)
    return buffer.getvalue()


def zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("step-00000007.safetensors", data)
    return buffer.getvalue()


def last_of_data(data: bytes) -> int:
    return len(data) - 1


# What became of the bytes of a file.
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    **{
        f"cut to {share:%}": lambda d, share=share: d[: int(share * len(d))]
        for share in (0.0, 0.00001, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999)
    },
    "cut by one byte": lambda d: d[:-1],
    "cut after the length": lambda d: d[:8],
    "cut inside the length": lambda d: d[:5],
    "cut after the header": lambda d: d[: header_size(d)],
    "one byte more": lambda d: d + b"\0",
    "twice": lambda d: d + d,
    "first byte gone": lambda d: d[1:],
    "first half gone": lambda d: d[len(d) // 2 :],
    "halves swapped": lambda d: d[len(d) // 2 :] + d[: len(d) // 2],
    "reversed": lambda d: d[::-1],
    "all zero": lambda d: bytes(len(d)),
    "all ones": lambda d: b"\xff" * len(d),
    "noise": lambda d: random.Random(0).randbytes(len(d)),
    "tail zero, as after a crash": lambda d: d[:-4096] + bytes(4096),
    "a zero page inside": lambda d: d[:20480] + bytes(4096) + d[24576:],
    "header zero": lambda d: d[:8] + bytes(header_size(d) - 8) + d[header_size(d) :],
    "length too large": lambda d: (2**62).to_bytes(8, "little") + d[8:],
    "length too small": lambda d: (10).to_bytes(8, "little") + d[8:],
    "length negative": lambda d: b"\xff" * 8 + d[8:],
    "length off by one": lambda d: flip(d, 0),
    "bit of the header's first byte": lambda d: flip(d, 8),
    "bit of the first number": lambda d: flip(d, header_size(d)),
    "bit of a number in the middle": lambda d: flip(d, (header_size(d) + len(d)) // 2, 0x80),
    "bit of the last number": lambda d: flip(d, last_of_data(d), 0x40),
    "two numbers swapped": lambda d: d[:-8] + d[-4:] + d[-8:-4],
    "settings changed": in_header(rb"\"context\": 8", rb"\"context\": 9"),
    "progress changed": in_header(rb"\"step\": 7", rb"\"step\": 8"),
    "tensor renamed": in_header(b"model.norm.weight", b"model.norm.weighs"),
    "dtype changed": in_header(b'"dtype":"F32"', b'"dtype":"I32"'),
    "format changed": in_header(b"byte-lm-5", b"byte-lm-9"),
    "header not UTF-8": in_header(b"byte-lm-5", b"byte-lm\xff\xfe"),
    "empty": lambda _: b"",
    "text": lambda _: b"hello\n" * 100,
    "JSON": lambda _: b'{"format": "torchmoe-byte-lm-5"}',
    "pickle": lambda _: pickle.dumps({"weight": [1.0]}),
    "torch.save": pickled,
    "gzip": gzip.compress,
    "zip": zipped,
}


def refused(path: Path, message: str) -> None:
    """Loading fails with a line that names the file, and restoring it is not reached."""
    with pytest.raises(CheckpointError) as error:
        restore(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def restore(path: Path) -> None:
    """Loads and restores into a model that must be untouched where that fails."""
    model, optimizer = new_model(seed=1)
    try:
        found = checkpoint.load(path)
        checkpoint.restore_model(found, model)
        checkpoint.restore_optimizer(found, optimizer)
    except CheckpointError:
        assert_same(state(model, optimizer), state(*new_model(seed=1)))
        raise


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_refuses_a_damaged_file(
    damage: Callable[[bytes], bytes], whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "step-00000007.safetensors"
    data = damage(whole.read_bytes())
    assert data != whole.read_bytes()
    path.write_bytes(data)
    refused(path, "")


def test_there_are_enough_kinds_of_damage() -> None:
    assert len(DAMAGE) >= 40


@pytest.mark.parametrize("seed", range(20))
def test_refuses_any_flipped_bit(seed: int, whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    draw = random.Random(seed)
    # Half of the bits in the header, which is small compared with the tensors.
    place = draw.randrange(header_size(data) if seed % 2 else len(data))
    path = tmp_path / "step-00000007.safetensors"
    path.write_bytes(flip(data, place, 1 << draw.randrange(8)))
    refused(path, "")


def rewritten(whole: Path, path: Path, change: Callable[[dict, dict], None], sign: bool) -> None:
    """The same file with other content, and a hash that fits it if `sign`."""
    tensors = load_file(whole)
    with safe_open(whole, "pt") as file:
        content = dict(file.metadata())
    change(content, tensors)
    if sign:
        content.pop("sha256", None)
        content["sha256"] = checkpoint.hash_of(content, tensors)
    save_file(tensors, path, content)


def put(key: str, value: str) -> Callable[[dict, dict], None]:
    return lambda content, _: content.update({key: value})


def settings_with(**values: object) -> Callable[[dict, dict], None]:
    return put("settings", json.dumps({**SETTINGS.to_dict(), **values}))


def progress_with(**values: object) -> Callable[[dict, dict], None]:
    whole_progress = {**vars(Progress()), "step": 7}
    return put("progress", json.dumps({**whole_progress, **values}))


NAME = "model.blocks.0.feed_forward.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "sign", "message"),
    [
        (lambda c, _: c.clear(), False, "is not a checkpoint of this program"),
        (put("format", "gpt-2"), True, "is not a checkpoint of this program"),
        (put("format", "torchmoe-byte-lm-2"), True, "is of another version of this program"),
        (lambda c, _: c.pop("sha256"), False, "does not match its hash"),
        (put("sha256", "0" * 64), False, "does not match its hash"),
        (put("origin", "{}"), False, "does not match its hash"),
        (lambda _, t: t[NAME].add_(1), False, "does not match its hash"),
        (lambda _, t: t.pop(NAME), False, "does not match its hash"),
        (lambda _, t: t.pop(NAME), True, "other tensors than its settings ask for"),
        (lambda _, t: t.pop(f"optimizer{NAME[5:]}.exp_avg"), True, "other tensors"),
        (lambda _, t: t.update(extra=torch.zeros(1)), True, "other tensors"),
        (lambda _, t: t.update({NAME: t[NAME][:1].clone()}), True, "other tensors"),
        (lambda _, t: t.update({NAME: t[NAME].double()}), True, "other tensors"),
        (lambda _, t: t.clear(), True, "other tensors"),
        (settings_with(layers=0), True, "damaged settings: layers must be a whole number"),
        (settings_with(lr="fast"), True, "damaged settings: lr must be a number"),
        (settings_with(top_k=3), True, "damaged settings: --top-k must be at most"),
        (settings_with(estimator="magic"), True, "damaged settings: estimator must be one of"),
        (settings_with(colour="blue"), True, "damaged settings: 'colour' is no option"),
        (put("settings", "{"), True, "damaged settings"),
        (put("settings", "[]"), True, "damaged settings"),
        (put("settings", '{"layers": 1}'), True, "damaged settings"),
        (lambda c, _: c.pop("settings"), True, "damaged settings"),
        (lambda c, _: c.pop("progress"), True, "damaged settings"),
        (put("progress", "seven"), True, "damaged settings"),
        (progress_with(step="7"), True, "damaged settings: progress must be"),
        (progress_with(step=-1), True, "damaged settings: progress must be"),
        (progress_with(speed=3), True, "damaged settings: progress must be"),
    ],
)
def test_refuses_other_content(
    change: Callable[[dict, dict], None], sign: bool, message: str, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "step-00000007.safetensors"
    rewritten(whole, path, lambda *_: None, sign=True)
    restore(path)
    rewritten(whole, path, change, sign)
    refused(path, message)


def test_refuses_tensors_of_another_size_than_the_settings(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-00000007.safetensors"
    rewritten(whole, path, settings_with(hidden_size=64, batch_tokens=8), sign=True)
    found = checkpoint.load(path)
    with pytest.raises(CheckpointError, match="other tensors than its settings ask for"):
        train_lm.new_job(found.settings, found, resumes=True)


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such file")
    refused(tmp_path, "holds no checkpoint")
    (tmp_path / "step-00000001.safetensors").mkdir()
    refused(tmp_path / "step-00000001.safetensors", "holds no checkpoint")


def test_resume_names_the_damaged_file_and_changes_nothing(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder.RunFolder(tmp_path)
    folder.make()
    shutil.copy(whole, folder.checkpoints)
    newest = folder.checkpoints / "step-00000009.safetensors"
    newest.write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(SystemExit):
        train_lm.main(["--resume", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert error.startswith(f"train_lm.py: error: --resume: {newest} is not a safetensors file")
    assert len(list(folder.checkpoints.iterdir())) == 2


# ---- kills


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes as POSIX has them")
@pytest.mark.parametrize(
    ("kills", "killed", "steps", "every"), [("20", 20, 200, 3), ("points", 27, 40, 1)]
)
def test_a_run_that_is_killed_again_and_again_gives_the_same_weights(
    kills: str, killed: int, steps: int, every: int, tiny: list[str], tmp_path: Path
) -> None:
    options = [*tiny, "--steps", str(steps), "--checkpoint-every", str(every)]
    script = Path(__file__).with_name("killed_run.py")
    broken = subprocess.run(
        [sys.executable, script, kills, *options, "--out", str(tmp_path / "broken")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert broken.returncode == 0, broken.stderr
    assert int(broken.stdout) == killed
    assert train_lm.main([*options, "--out", str(tmp_path / "whole")]) == 0

    ends = [checkpoint.load(tmp_path / name) for name in ("broken", "whole")]
    assert ends[0].progress.step == steps
    assert_same(ends[0].tensors, ends[1].tensors)
    folders = [run_folder.RunFolder(tmp_path / name) for name in ("broken", "whole")]
    assert numbers(folders[0]) == numbers(folders[1])
    assert [
        path.name for path in folders[0].checkpoints.iterdir() if "unfinished" in path.name
    ] == []


def numbers(folder: run_folder.RunFolder) -> list[dict[str, object]]:
    """The records without what depends on time."""
    records = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    timed = {"seconds", "training_seconds", "tokens_per_second"}
    return [{k: v for k, v in record.items() if k not in timed} for record in records]
