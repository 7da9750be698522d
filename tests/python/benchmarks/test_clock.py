"""Blocks, their repetition, and what a run says of them in the end."""

from __future__ import annotations

import pytest

from benchmarks import clock
from benchmarks.clock import Clock, interleave
from steady_machine import AVX512_BF16, SteadyPeaks


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "PATIENCE", 1)
    monkeypatch.setattr(clock, "SHORTEST", 0.0)


def measured(names: str, start: float, *looks: float, repeats: int = 0) -> Clock:
    """Two looks go with each block."""
    found = Clock(1, SteadyPeaks(start, looks), repeats)
    for name in names:
        found.measure(name, {"member": lambda: 1.0})
    return found


def test_every_member_runs_in_every_round_in_an_order_that_turns() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: float(order.append(name) or 1) for name in "abc"}
    times = interleave(runs, 3)
    assert "".join(order) == "abcbcacab"
    assert {name: len(found.seconds) for name, found in times.items()} == dict.fromkeys("abc", 3)


def test_a_slow_member_sits_out_after_a_few_rounds() -> None:
    times = interleave({"slow": lambda: clock.LONGEST, "quick": lambda: 0.1}, 8)
    assert len(times["slow"].seconds) == clock.FEWEST
    assert len(times["quick"].seconds) == 8


def test_a_throttled_block_is_measured_again() -> None:
    found = measured("a", 100, 80, 80, 100, 100, repeats=3)
    assert found.blocks[0].repeats == 1
    assert not found.blocks[0].throttled
    assert found.warning() is None


def test_a_share_is_of_the_better_probe() -> None:
    block = measured("a", 100, 96, 99).blocks[0]
    assert block.peak() == 99e9


def test_a_steady_run_says_nothing() -> None:
    assert measured("ab", 100, 96, 97, 99, 101).warning() is None
    assert measured("", 100).warning() is None


def test_a_block_that_stayed_throttled_is_named() -> None:
    warning = measured("ab", 100, 100, 100, 80, 98).warning()
    assert warning is not None
    assert "\n" not in warning
    assert "in 1 of 2 blocks below the best of the run (FMA 100 GFLOP/s)" in warning
    assert warning.endswith(": b (down to 80%, shares up to 2% too high)")


def test_a_best_that_came_later_names_the_blocks_before_it() -> None:
    found = measured("abc", 90, 90, 90, 125, 125, 124, 125)
    assert not any(block.throttled for block in found.blocks)
    warning = found.warning()
    assert warning is not None
    assert warning.endswith(
        "in 1 of 3 blocks below the best of the run (FMA 125 GFLOP/s): "
        "a (down to 72%, shares up to 39% too high)"
    )


def test_a_small_fall_is_named_where_it_flatters_shares() -> None:
    assert (
        measured("ab", 100, 100, 93, 93, 94)
        .warning()
        .endswith(": b (down to 93%, shares up to 6% too high)")
    )


def test_every_peak_counts() -> None:
    peaks = SteadyPeaks(100, [100], AVX512_BF16)
    peaks.undisturbed = lambda: {"FMA": 100, "bfloat16 dot": 400}  # type: ignore[method-assign]
    found = Clock(1, peaks, 0)
    block = found.measure("a", {"member": lambda: 1.0})
    assert block.throttled
    assert block.peak("bfloat16 dot") == 200e9
    assert "a (down to 50%, shares up to 100% too high)" in found.warning()
    assert str(block) == (
        "FMA peak 100 before, 100 GFLOP/s after; "
        "bfloat16 dot peak 200 before, 200 GFLOP/s after, throttled"
    )
