"""Fresh tokens, and the ratios of a block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import moe_layer
from benchmarks.clock import Block, Clock, Times
from benchmarks.contenders import IN_FLOAT32, LOOP, OURS, Shape
from benchmarks.moe_layer import FRESH, Case, Result, Row, cells, conclusions, measure, with_tokens
from benchmarks.peaks import DOT, FMA
from benchmarks.traffic import OP, READS
from steady_machine import AVX512_BF16, SteadyPeaks

CASE = Case(Shape(16, 8, 8, 4, 2))
DENSE = "six dense mm"


def result(seconds: dict[str, list[float]], peak: str = FMA, case: Case = CASE) -> Result:
    look = {FMA: 1.0, DOT: 4.0}
    times = {name: Times(found) for name, found in seconds.items()}
    return Result(case, Block("", times, look, look, 0, False), DENSE, peak)


def test_tokens_are_made_for_each_run_before_its_clock() -> None:
    seen: dict[str, list[float]] = {"a": [], "b": []}

    def step(name: str, x: Tensor) -> float:
        seen[name].append(x.item())
        return 1.0

    made = iter(range(9))
    members = {name: lambda x, name=name: step(name, x) for name in seen}
    runs = with_tokens(members, lambda: torch.tensor(float(next(made))), FRESH)
    assert list(runs) == ["a" + FRESH, "b" + FRESH]
    for _ in range(2):
        assert [run() for run in runs.values()] == [1.0, 1.0]
    assert seen == {"a": [0, 2], "b": [1, 3]}


@pytest.mark.parametrize("forward_only", [False, True])
def test_no_fresh_tokens_are_seen_twice(
    forward_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by one contender nor by two, and the others are the same in every round."""
    seen: list[Tensor] = []
    original = moe_layer.our_layer

    def watched(shape: Shape, dtype: torch.dtype):
        ours = original(shape, dtype)
        ours.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        return ours

    monkeypatch.setattr(moe_layer, "our_layer", watched)
    monkeypatch.setattr("benchmarks.clock.SHORTEST", 0.0)
    clock = Clock(4, SteadyPeaks(1), 0)
    case = Case(CASE.shape, forward_only)
    torch.manual_seed(0)
    found = measure(case, torch.float32, (), clock, loop=False)
    assert len(found.block.times[OURS].seconds) == 4
    assert len(found.block.times[OURS + FRESH].seconds) == 4
    # A warm-up and four rounds; the same ones first.
    kinds = [next(i for i, other in enumerate(seen) if torch.equal(other, x)) for x in seen]
    assert len(seen) == 10
    assert sorted(kinds.count(kind) for kind in set(kinds)) == [1] * 5 + [5]
    assert (OP in found.rows) is forward_only
    assert (READS in found.rows) is forward_only


def test_every_contender_is_there_with_fresh_tokens() -> None:
    clock = Clock(1, SteadyPeaks(1, instructions=AVX512_BF16), 0)
    found = measure(CASE, torch.bfloat16, (), clock)
    assert list(found.rows) == [DENSE, OURS, LOOP, IN_FLOAT32]
    fresh = {name for name, row in found.rows.items() if row.fresh_ms is not None}
    assert fresh == {OURS, LOOP}
    assert found.peak == DOT


def test_p_is_that_of_the_fastest_peer() -> None:
    found = result(
        {
            DENSE: [1.0],
            OURS: [2.0, 3.0, 9.0],
            LOOP: [4.0, 9.0, 9.0],
            "transformers eager": [5.0, 6.0, 7.0],
            OURS + FRESH: [1.0, 4.0, 9.0],
            LOOP + FRESH: [3.0, 6.0, 9.0],
            "transformers eager" + FRESH: [1.0, 8.0, 9.0],
        }
    )
    assert conclusions(found) == [
        f"P = 2.00 (minima): {LOOP} over torchmoe",
        "P = 2.00 (medians): transformers eager over torchmoe",
        f"P = 1.50 (medians, fresh tokens): {LOOP} over torchmoe",
    ]
    assert found.rows[OURS].fresh_ms == 4000


def test_without_peers_there_is_no_p() -> None:
    assert conclusions(result({DENSE: [1.0], OURS: [1.0], OURS + FRESH: [1.0]})) == []


def test_a_share_is_of_the_peak_that_bounds_the_contender() -> None:
    found = result({DENSE: [1.0], OURS: [1.0], IN_FLOAT32: [1.0]}, DOT)
    assert found.rows[OURS].share_of_peak == CASE.flops / 4e9
    assert found.rows[IN_FLOAT32].share_of_peak == CASE.flops / 1e9


def test_the_time_over_the_bound_of_a_few_tokens() -> None:
    seconds = {DENSE: [1.0], OURS: [3e-4], READS: [2e-4], IN_FLOAT32: [5e-4]}
    rows = result(seconds, case=Case(CASE.shape, True)).rows
    assert rows[OURS].min_over_bound == pytest.approx(1.5)
    assert rows[OURS].us_over_bound == pytest.approx(100)
    assert rows[READS].gflops is None
    assert rows[IN_FLOAT32].min_over_bound is None
    assert rows[DENSE].min_over_bound is None
    assert result({DENSE: [1.0], OURS: [1.0]}).rows[OURS].min_over_bound is None


def test_what_does_not_apply_is_an_empty_cell() -> None:
    row = Row(1, 2, 3, None, 5, 6, None, None, 9, 0.1, 11)
    assert cells(row) == ["1.00", "2.00", "3.00", "", "5.00", "6.00", "", "", "9.0", "0.100", "11"]
