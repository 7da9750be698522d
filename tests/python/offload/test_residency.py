"""What is in memory: budgets, counters, and experts that are read ahead."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from streamed import assert_same, drawn, expert_bytes, gradients, pair, slots_of
from torchmoe.nn import Experts
from torchmoe.offload import offload

HERE = Path(__file__).parents[1]


def experts_of(num_slots: int, num_experts: int = 8, **options: object) -> Experts:
    return Experts(8, 12, num_experts, **options).requires_grad_(False)  # type: ignore[arg-type]


def test_a_budget_below_one_expert_is_refused(tmp_path: Path) -> None:
    experts = experts_of(1)
    least = slots_of(experts, 1)
    assert offload(experts_of(1), budget=least).num_slots == 1
    size, before = expert_bytes(experts), experts.down_proj.clone()
    message = (
        rf"^offload: budget must be at least {least}, {size} bytes for one expert and "
        rf"{least - size} for reading, got {least - 1}$"
    )
    with pytest.raises(ValueError, match=message):
        offload(experts, budget=least - 1, store=tmp_path / "store")
    assert not list(tmp_path.iterdir())
    assert torch.equal(experts.down_proj, before)


def test_a_large_budget_holds_all() -> None:
    given = pair(num_slots=8)
    for _ in range(3):
        assert_same(given, drawn(given.resident, 100, 2))
    assert given.offloaded.misses == 8
    assert given.offloaded.bytes_read == given.offloaded._file.num_bytes


@pytest.mark.parametrize("num_slots", [1, 3, 8])
def test_the_budget_is_kept(num_slots: int) -> None:
    given = pair(num_slots=num_slots)
    experts = given.offloaded
    assert experts.resident_bytes == 0
    for _ in range(5):
        gradients(experts, drawn(given.resident, 30, 3))
        assert experts.resident_bytes <= experts.peak_resident_bytes <= experts.budget
    # All slots are in use, and none is being read.
    assert experts.resident_bytes == num_slots * expert_bytes(given.resident)
    assert experts.peak_resident_bytes == experts.budget


def test_counters() -> None:
    given = pair(num_slots=3)
    experts = given.offloaded
    assert math.isnan(experts.hit_rate)
    assert math.isnan(experts.prediction_hit_rate)
    one = torch.tensor([[1, 1], [1, -1]])
    call = drawn(given.resident, 2, 2, ids=one)
    gradients(experts, call)  # read forward, found backward
    assert (experts.hits, experts.misses, experts.hit_rate) == (1, 1, 0.5)
    assert experts.bytes_read == expert_bytes(given.resident)
    experts.reset_counters()
    assert (experts.hits, experts.misses, experts.bytes_read) == (0, 0, 0)
    assert math.isnan(experts.hit_rate)
    assert 1 in experts._residents.residents


def test_what_is_needed_most_is_read_first() -> None:
    given = pair(num_slots=8)
    read: list[int] = []
    file = given.offloaded._file
    original = file.read
    file.read = lambda expert, into: read.append(expert) or original(expert, into)  # type: ignore[method-assign, func-returns-value]
    ids = torch.tensor([[5, 2], [5, 7], [0, 7], [5, 7], [3, -1]])
    assert_same(given, drawn(given.resident, 5, 2, ids=ids))
    assert read == [5, 7, 0, 2, 3]


@pytest.mark.parametrize("policy", ["usage", "lru", "lfu"])
def test_warm(policy: str) -> None:
    given = pair(num_slots=3, policy=policy)
    experts = given.offloaded
    usage = torch.tensor([0.0, 0.2, 0.1, 0.0, 0.3, 0.1, 0.3, 0.0])
    experts.warm(usage)
    assert sorted(experts._residents.residents) == [1, 4, 6]
    assert (experts.hits, experts.misses) == (0, 0)
    assert experts.bytes_read == 3 * expert_bytes(given.resident)
    experts.warm(usage.flip(0))
    assert sorted(experts._residents.residents) == [1, 3, 6]
    assert experts.bytes_read == 4 * expert_bytes(given.resident)
    assert_same(given, drawn(given.resident, 20, 2))
    assert experts.peak_resident_bytes <= experts.budget


def test_warm_sets_the_averages() -> None:
    experts = pair(num_slots=2).offloaded
    experts.warm(torch.tensor([0.5, 0.3, 0.2, 0, 0, 0, 0, 0]))
    x, weights = torch.randn(1, 8), torch.ones(1, 1)
    experts(x, torch.tensor([[7]]), weights)  # in the place of 1
    assert sorted(experts._residents.residents) == [0, 7]
    experts(x, torch.tensor([[2]]), weights)  # in the place of 7
    assert sorted(experts._residents.residents) == [0, 2]


@pytest.mark.parametrize(
    ("usage", "error"),
    [
        (torch.ones(7), RuntimeError),
        (-torch.ones(8), ValueError),
        (torch.full((8,), math.nan), ValueError),
        ([1.0] * 8, TypeError),
    ],
)
def test_warm_refuses(usage: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^warm: usage must "):
        pair().offloaded.warm(usage)  # type: ignore[arg-type]


def test_the_given_experts_are_freed() -> None:
    experts = experts_of(3)
    parameter = experts.down_proj
    offloaded = offload(experts, budget=slots_of(experts, 3))
    assert all(parameter.is_meta for parameter in experts.parameters())
    assert experts.down_proj.shape == (8, 8, 12)
    assert not parameter.is_meta  # whoever holds it still has it
    assert not list(offloaded.parameters())


MEMORY = """
import gc, sys
from pathlib import Path
import torch
from page_cache import cached_bytes, process_bytes
from streamed import slots_of
from torchmoe.nn import Experts
from torchmoe.offload import offload

H, I, E, SLOTS = 256, 1024, 24, 4

path = Path(sys.argv[1])
experts = Experts(H, I, E).requires_grad_(False)
budget = slots_of(Experts(H, I, E, device="cpu").requires_grad_(False), SLOTS)
gc.collect()
offloaded = offload(experts, budget=budget, store=path)
assert offloaded.num_slots == SLOTS
size = offloaded._file.num_bytes
del experts
x = torch.randn(64, H)
torch.nn.functional.linear(x, torch.randn(4 * I, H))  # the library's own memory
gc.collect()
before = process_bytes()
worst = worst_cache = 0
for step in range(3):
    ids = torch.randint(0, E, (64, 2))
    with torch.no_grad():
        offloaded(x, ids, torch.rand(64, 2))
    worst, worst_cache = max(worst, process_bytes() - before), max(worst_cache, cached_bytes(path))
assert offloaded.misses > E
# Beside the slots: activations of 128 rows, and what malloc keeps.
slack = 16 << 20
print(size, budget, worst, worst_cache, offloaded.peak_resident_bytes)
assert worst <= budget + slack < size
assert worst_cache <= offloaded._file.window_bytes
assert offloaded.peak_resident_bytes <= budget
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_process_stays_within_the_budget(tmp_path: Path) -> None:
    """As the system counts it, and the store's pages that the system keeps."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "store.safetensors")]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=HERE,
    )
    assert run.returncode == 0, run.stdout + run.stderr
