"""The benchmarks of offloaded experts, with small ones: that they compare what they say."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.offload import paging, policies, prediction
from benchmarks.offload.paging import MAPPED, OFFLOAD, RESIDENT, HalfEvicted, Result
from benchmarks.offload.prediction import Size
from torchmoe.nn import Experts, MoE
from torchmoe.offload import Machine, write_store
from torchmoe.offload.layout import stored_sizes

SIZE = Size(64, 48, 8, 2)


@pytest.fixture
def store(tmp_path: Path) -> tuple[Path, Experts]:
    experts = SIZE.make()
    write_store(tmp_path / "a", experts)
    return tmp_path / "a", experts


def test_a_size_is_four_integers() -> None:
    assert Size.parse(str(SIZE)) == SIZE
    for text in ("1,2,3", "1,2,3,x", "1,2,0,1"):
        with pytest.raises(argparse.ArgumentTypeError, match="four integers"):
            Size.parse(text)


# ---- prediction


def test_every_setting_is_measured_and_predicted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(1e9, 1e10, 1e10, 1e-4, 0.5)
    monkeypatch.setattr(prediction, "measure_machine", lambda *_, **__: machine)
    monkeypatch.setattr(prediction, "SECONDS", 0.0)
    file = tmp_path / "found.json"
    options = ["--size", str(SIZE), "--tokens", "1", "--tokens", "64", "--folder", str(tmp_path)]
    assert prediction.main([*options, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert len(found) == len(prediction.BUDGETS) * 2 * 2
    assert all(one["measured"] > 0 and one["predicted"] > 0 for one in found)
    for one in found:
        assert one["expected_hit_rate"] == pytest.approx(one["budget"] / 100)
        if one["budget"] == 100:
            assert one["hit_rate"] == 1
        if one["tokens"] == 64:  # which need all experts
            assert one["hit_rate"] == pytest.approx(one["budget"] / 100, abs=0.02)
    assert f"of {len(found)} predictions are within 25%" in capsys.readouterr().out


def test_only_the_experts_are_timed(
    monkeypatch: pytest.MonkeyPatch, store: tuple[Path, Experts]
) -> None:
    """The clock stands still in between."""
    model = prediction.Layers(SIZE, [store[0], store[0]], budget=1 << 20)
    now = iter(range(100))
    monkeypatch.setattr(prediction.time, "perf_counter", lambda: float(next(now)))
    with torch.inference_mode():
        model(torch.randn(3, SIZE.hidden))
    assert model.seconds == 2.0


# ---- paging


def test_mapped_experts_are_those_of_the_file(store: tuple[Path, Experts]) -> None:
    path, experts = store
    found, view = paging.mapped(path, SIZE)
    evicted = HalfEvicted(path, found, view)
    for _ in range(3):
        for name, parameter in experts.named_parameters():
            assert torch.equal(found.get_parameter(name), parameter)
        evicted()


def test_a_few_tokens_have_favourites_and_many_have_none() -> None:
    size = Size(4, 4, 64, 2)
    random = torch.Generator().manual_seed(0)
    few = torch.cat([paging.choices(size, 8, random) for _ in range(500)])
    assert (few[:, 0] != few[:, 1]).all()
    counts = few.flatten().bincount(minlength=64).sort(descending=True).values
    assert counts[0] > 20 * counts[-1] > 0
    many = paging.choices(size, 4000, random).flatten().bincount(minlength=64)
    assert many.max() < 2 * many.min()


@pytest.mark.slow
def test_the_contenders_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is no memory cgroup, too."""
    monkeypatch.setattr(paging.Limit, "make", classmethod(lambda cls: None))
    file = tmp_path / "found.json"
    options = ["--size", str(SIZE), "--tokens", "4", "--seconds", "0", "--folder", str(tmp_path)]
    assert paging.main([*options, "--json", str(file)]) == 0
    found = [Result(**one) for one in json.loads(file.read_text())]
    assert [one.contender for one in found] == 2 * [OFFLOAD, MAPPED, RESIDENT]
    assert [one.trains for one in found] == 3 * [False] + 3 * [True]
    assert [len({one.outputs for one in part}) for part in (found[:3], found[3:])] == [1, 1]
    assert [one.hit_rate is None for one in found] == 2 * [False, True, True]
    assert "no memory cgroup can be made here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "said"), [(-9, "killed by the system"), (0, "it runs"), (1, "ends with 1")]
)
def test_what_becomes_of_experts_in_memory(
    code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], code, "", "")
    monkeypatch.setattr(paging, "start", lambda *_: done)
    setting = paging.Setting(SIZE, tmp_path, 4, trains=False, seconds=0.0)
    assert paging.fate(setting, tmp_path) == said


def test_outputs_that_differ_end_it(store: tuple[Path, Experts], monkeypatch: Any) -> None:
    def run(contender: str, *_: object) -> Result:
        return Result(contender, 1, False, 1.0, 1.0, 1.0, 0.0, None, 1, contender)

    monkeypatch.setattr(paging, "run", run)
    with pytest.raises(SystemExit, match="the contenders do not agree with 4 tokens"):
        paging.compare(paging.Setting(SIZE, store[0], 4, trains=False, seconds=0.0), None)


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_is_made_below_the_own_group(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "3:cpu:/x\n4:memory:/own\n0::/other\n" if version == 1 else "0::/own\n"
    root = "/sys/fs/cgroup/memory/own" if version == 1 else "/sys/fs/cgroup/own"
    name = "memory.limit_in_bytes" if version == 1 else "memory.max"
    real = Path.mkdir

    def mkdir(path: Path) -> None:
        assert re.fullmatch(root + r"/torchmoe-\d+", str(path))
        made.append(path)

    made: list[Path] = []
    monkeypatch.setattr(Path, "read_text", lambda path: lines)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "exists", lambda path: path.name == name)
    limit = paging.Limit.make()
    monkeypatch.setattr(Path, "mkdir", real)
    assert limit is not None
    assert [limit.folder] == made


# ---- policies


def recorded(count: int) -> policies.Recorded:
    layer = MoE(16, 8, 8, 2).eval().requires_grad_(False)
    x = torch.randn(count, 16)
    with torch.inference_mode():
        output = layer(x)
    return policies.Recorded(layer, x, output.hidden_states, output.routing.indices)


def test_the_recorded_calls_are_gone_through(tmp_path: Path) -> None:
    layers = [recorded(30), recorded(30)]
    stores = [tmp_path / "0", tmp_path / "1"]
    for one, path in zip(layers, stores, strict=True):
        write_store(path, one.layer.experts)
    found = {
        (policy, linked): policies.measure(layers, stores, 50, policy, linked)
        for policy in policies.POLICIES
        for linked in (False, True)
    }
    expert_bytes, _ = stored_sizes("", layers[0].layer.experts)
    for (_, linked), result in found.items():
        needed = 20 * 2 * 2 / 20  # by two layers, for a byte of text
        if linked:
            assert result.predicted is not None
            assert 0 <= result.predicted <= 1
        else:
            missed = needed * (1 - result.hit_rate)
            assert result.kilobytes_read == pytest.approx(missed * expert_bytes / 1e3)
            assert result.hit_rate <= found["oracle", False].hit_rate


def test_another_output_ends_it(tmp_path: Path) -> None:
    one = recorded(9)
    write_store(tmp_path / "0", one.layer.experts)
    one = replace(one, y=one.y + 1)
    with pytest.raises(SystemExit, match="lru gives another output in layer 0"):
        policies.measure([one], [tmp_path / "0"], 50, "lru", False)
