"""The formula of `plan_offload` against a schedule that is played through, and its numbers."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from torchmoe.nn import Experts
from torchmoe.offload import planning
from torchmoe.offload.planning import Machine, OffloadPlan, measure_machine, plan_offload

H, INNER, E = 64, 32, 8
EXPERT_BYTES = 4 * 3 * H * INNER
ROOM = 1 << 20  # more than reading needs
MACHINE = Machine(
    bandwidth=EXPERT_BYTES / 0.5,  # an expert is read in half a second
    flops=2 * 3 * H * INNER / 0.01,  # a row takes 0.01 s
    memory_bandwidth=EXPERT_BYTES / 0.2,  # and an expert's matrices 0.2 s
    overhead=0.03,
    overlap=1.0,
)
META = Experts(H, INNER, E, device="meta")


def planned(**options: Any) -> OffloadPlan:
    given = {"num_tokens": 64, "top_k": 2, "budget": ROOM} | MACHINE._asdict() | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return plan_offload(given.pop("experts", META), **given)


def played(count: int, missed: int, read: float, compute: float) -> float:
    """When a call has finished that computes what is resident, then each expert that arrives."""
    now = (count - missed) * compute
    for number in range(missed):
        now = max(now, (number + 1) * read) + compute
    return now


# Of 64 tokens with 2 of 8 experts each, all are needed, up to 1e-8; an expert has 16 rows.
COMPUTE = 0.2 + 16 * 0.01


@pytest.mark.parametrize("missed", range(9))
@pytest.mark.parametrize("read", [0.01, 0.3, 0.36, 0.5, 1.0, 5.0])
def test_a_call_takes_as_long_as_its_schedule(missed: int, read: float) -> None:
    plan = planned(hit_rate=1 - missed / 8, bandwidth=EXPERT_BYTES / read)
    assert plan.step_time == pytest.approx(0.03 + played(8, missed, read, COMPUTE), rel=1e-6)
    assert plan.load_time == pytest.approx(missed * read, rel=1e-6)
    assert plan.compute_time == pytest.approx(0.03 + 8 * COMPUTE, rel=1e-6)
    assert plan.fits


def test_less_than_a_read_for_each_call() -> None:
    slow = {"bandwidth": EXPERT_BYTES / 5.0}
    always = planned(**slow, hit_rate=1.0).step_time
    never = planned(**slow, hit_rate=7 / 8).step_time
    assert never > always
    between = planned(**slow, hit_rate=1 - 0.25 / 8).step_time
    assert between == pytest.approx(0.75 * always + 0.25 * never, rel=1e-6)


@pytest.mark.parametrize("hit_rate", [0.0, 0.5, 1.0])
def test_what_does_not_overlap_is_added(hit_rate: float) -> None:
    whole, none, half = (planned(hit_rate=hit_rate, overlap=share) for share in (1.0, 0.0, 0.5))
    assert none.step_time == pytest.approx(none.compute_time + none.load_time)
    assert half.step_time == pytest.approx((whole.step_time + none.step_time) / 2)
    assert whole[1:] == none[1:] == half[1:]


@pytest.mark.parametrize("read", [0.1, 5.0])
@pytest.mark.parametrize("training", [False, True])
def test_layers_and_passes(read: float, training: bool) -> None:
    passes = 2 if training else 1
    options = {"hit_rate": 0.5, "bandwidth": EXPERT_BYTES / read}
    one = planned(**options)
    several = planned(**options, num_layers=3, training=training)
    for name in ("step_time", "load_time", "compute_time"):
        assert getattr(several, name) == pytest.approx(3 * passes * getattr(one, name))
    linked = planned(**options, num_layers=3, training=training, prefetch=True)
    behind = max(one.compute_time, one.load_time)
    assert linked.step_time == pytest.approx(passes * (one.step_time + 2 * behind))
    assert linked[1:3] == several[1:3]


def test_a_single_layer_has_nothing_to_be_read_ahead_by() -> None:
    assert planned(prefetch=True) == planned()


# ---- which experts are needed, and which of those are resident


@pytest.mark.parametrize("shares", [[0.25, 0.25, 0.25, 0.25], [0.7, 0.2, 0.1, 0.0]])
def test_the_experts_that_tokens_need(shares: list[float]) -> None:
    """Of every way in which three tokens can choose one of four experts."""
    needed = [0.0] * 4
    for choice in itertools.product(range(4), repeat=3):
        likely = math.prod(shares[expert] for expert in choice)
        for expert in set(choice):
            needed[expert] += likely
    experts = Experts(H, INNER, 4, device="meta")
    usage = 12 * torch.tensor(shares)  # a usage need not sum to 1
    plan = planned(experts=experts, num_tokens=3, top_k=1, usage=usage, hit_rate=0.0)
    count = sum(needed)
    assert plan.load_time == pytest.approx(0.5 * count)
    assert plan.compute_time == pytest.approx(0.03 + 0.2 * count + 0.01 * 3)
    # Those that are needed most are resident.
    for num_slots in range(1, 5):
        budget = num_slots * EXPERT_BYTES + planning.stored_sizes("", experts)[1]
        plan = planned(experts=experts, num_tokens=3, top_k=1, usage=usage, budget=budget)
        assert plan.hit_rate == pytest.approx(sum(needed[:num_slots]) / count)


def test_no_usage_is_an_even_one() -> None:
    for num_tokens in (1, 5):
        budget = ROOM // 4
        given = planned(usage=torch.ones(E), num_tokens=num_tokens, budget=budget)
        assert planned(num_tokens=num_tokens, budget=budget) == given


def test_a_token_needs_as_many_experts_as_it_chooses() -> None:
    assert planned(num_tokens=1, hit_rate=0.0).load_time == pytest.approx(2 * 0.5)
    # One that gets more than one slot of each token is still one.
    skewed = torch.tensor([9.0, 1.0, 0, 0, 0, 0, 0, 0])
    assert planned(num_tokens=1, usage=skewed, hit_rate=0.0).load_time == pytest.approx(1.2 * 0.5)


@pytest.mark.parametrize(
    ("options", "elements"),
    [({}, 3), ({"activation": "relu"}, 2), ({"dtype": torch.bfloat16}, 3), ({"bias": True}, 3)],
    ids=str,
)
def test_the_bytes_and_operations_of_experts(options: dict[str, Any], elements: int) -> None:
    experts = Experts(H, INNER, E, device="meta", **options)
    size = sum(tensor.nbytes for tensor in experts.parameters()) // E
    only = {"num_tokens": 1, "top_k": 1, "hit_rate": 0.0, "overhead": 0.0}
    free = {"flops": 1e30, "memory_bandwidth": 1e30, "bandwidth": 1e30}
    assert planned(experts=experts, **only, **free | {"bandwidth": 10.0}).load_time == size / 10
    by_memory = planned(experts=experts, **only, **free | {"memory_bandwidth": 10.0})
    assert by_memory.compute_time == pytest.approx(size / 10)
    by_flops = planned(experts=experts, **only, **free | {"flops": 10.0})
    assert by_flops.compute_time == pytest.approx(2 * elements * H * INNER / 10)


# ---- where reading hides


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("read", [0.1, 0.36, 0.5, 1.0])
def test_reading_hides_from_the_break_even_rate_on(
    layers: int, prefetch: bool, read: float
) -> None:
    options = {
        "bandwidth": EXPERT_BYTES / read,
        "num_layers": layers,
        "prefetch": prefetch,
        "overhead": 0.5,
    }
    rate = planned(**options).break_even_hit_rate
    assert 0 <= rate <= 1

    def exposed(hit_rate: float) -> float:
        """What is longer than computing, apart from a first layer that nobody reads ahead for."""
        plan = planned(**options, hit_rate=hit_rate)
        first = planned(**options | {"num_layers": 1}, hit_rate=hit_rate)
        alone = first.step_time - first.compute_time if prefetch and layers > 1 else 0.0
        return plan.step_time - plan.compute_time - alone

    assert exposed(rate) == pytest.approx(0, abs=1e-6)
    if rate > 0.01:
        assert exposed(rate - 0.01) > 1e-4


def test_a_slow_disk_hides_nothing() -> None:
    plan = planned(bandwidth=1.0)
    assert plan.break_even_hit_rate == 1.0
    assert planned(bandwidth=1.0, num_layers=2, prefetch=True).break_even_hit_rate < 1.0


def test_a_warning_where_reading_does_not_hide() -> None:
    given = {"num_tokens": 64, "top_k": 2, "budget": ROOM} | MACHINE._asdict()
    rate = planned().break_even_hit_rate
    message = (
        r"plan_offload: reading takes 4e\+03 ms of a step that computes for 2.91e\+03 ms; it would "
        rf"hide from a hit rate of {rate:.3f} on, got 0.000"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        plan_offload(META, **given, hit_rate=0.0)
    assert caught[0].filename == __file__
    plan_offload(META, **given, hit_rate=rate)  # a warning would be an error


def test_a_budget_that_holds_no_expert() -> None:
    _, window_bytes = planning.stored_sizes("", META)
    least = EXPERT_BYTES + window_bytes
    assert planned(budget=least).fits
    plan = plan_offload(META, num_tokens=1, top_k=1, budget=least - 1, **MACHINE._asdict())
    assert not plan.fits
    assert plan.step_time == plan.load_time == math.inf
    assert plan.compute_time == planned(num_tokens=1, top_k=1).compute_time


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hit_rate": 1.1}, r"hit_rate must be in \[0, 1\], got 1.1"),
        ({"overlap": -0.1}, r"overlap must be in \[0, 1\], got -0.1"),
        ({"usage": torch.zeros(E)}, "usage must have a share above 0, got none"),
        ({"bandwidth": 0.0}, "bandwidth must be a finite number > 0, got 0.0"),
        ({"top_k": E + 1}, rf"top_k must be in \[1, {E}\], got {E + 1}"),
    ],
    ids=str,
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^plan_offload: {message}$"):
        planned(**options)


# ---- the numbers of the machine


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "ROUNDS", 1)
    monkeypatch.setattr(planning, "SAMPLE", 5 * EXPERT_BYTES)
    monkeypatch.setattr(planning, "MANY_ROWS", 8)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.bfloat16, "bias": True, "activation": "relu"}], ids=str
)
def test_one_call_gives_all_that_a_plan_needs(tmp_path: Path, options: dict[str, Any]) -> None:
    experts = Experts(H, INNER, E, device="meta", **options)
    before = torch.get_rng_state()
    machine = measure_machine(experts, folder=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert os.listdir(tmp_path) == []
    assert all(0 < value < math.inf for value in machine[:4])
    assert 0 <= machine.overlap <= 1
    planned(experts=experts, **machine._asdict())


@pytest.mark.usefixtures("quick")
def test_the_numbers_follow_from_the_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, rows = 5, 8

    def times() -> Iterator[float]:
        yield count * (0.2 + 0.01)  # a row for each expert
        yield count * (0.2 + rows * 0.01)
        yield count * 0.5  # reading all
        yield 4.0  # reading, repeated
        yield 3.0  # computing, repeated
        yield 5.5  # both at once
        yield 20 * 0.03  # calls of next to nothing

    taken = times()
    monkeypatch.setattr(planning, "_seconds", lambda call: (call(), next(taken))[1])
    machine = measure_machine(META, folder=tmp_path)
    assert machine == pytest.approx(MACHINE._replace(overlap=0.5))
    assert list(taken) == []


def test_the_time_of_a_call_is_that_of_the_median_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 5, 10, 11, 20, 23, 30, 32, 40, 44])
    monkeypatch.setattr(planning.time, "perf_counter", lambda: next(clock))
    calls: list[None] = []
    assert planning._seconds(lambda: calls.append(None)) == 3
    assert len(calls) == 6


def test_a_folder_that_is_none() -> None:
    with pytest.raises(TypeError, match=r"folder must be a path or None, got 3$"):
        measure_machine(META, folder=3)  # type: ignore[arg-type]
