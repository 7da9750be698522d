"""Each policy against a slow reference of it, on random traces."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from streamed import pair
from torchmoe.offload.policies import POLICIES

E = 12


def random_trace(calls: int, top_k: int = 3) -> list[list[int]]:
    """The ids of the slots of each call; some experts are asked for more often."""
    shares = torch.rand(E) ** 3
    return [torch.multinomial(shares, top_k, replacement=True).tolist() for _ in range(calls)]


def usage_by_formula(past: list[list[int]]) -> list[float]:
    average = [1 / E] * E
    for ids in past:
        average = [0.99 * a + 0.01 * ids.count(e) / len(ids) for e, a in enumerate(average)]
    return average


def last_use(past: list[list[int]], expert: int) -> int:
    return max((call for call, ids in enumerate(past) if expert in ids), default=-1)


def next_use(trace: list[list[int]], now: int, expert: int) -> float:
    return next((c for c in range(now, len(trace)) if expert in trace[c]), math.inf)


# For each policy the worth of an expert after the first `now` calls of a trace.
REFERENCES: dict[str, Callable[[list[list[int]], int, int], float]] = {
    "usage": lambda trace, now, e: usage_by_formula(trace[:now])[e],
    "lru": lambda trace, now, e: last_use(trace[:now], e),
    "lfu": lambda trace, now, e: sum(e in ids for ids in trace[:now]),
    "oracle": lambda trace, now, e: -next_use(trace, now, e),
}


def counts(ids: list[int]) -> dict[int, int]:
    return {expert: ids.count(expert) for expert in sorted(set(ids))}


def test_every_policy_has_a_reference() -> None:
    assert REFERENCES.keys() == POLICIES.keys()


@pytest.mark.parametrize("name", POLICIES)
def test_victims(name: str) -> None:
    trace = random_trace(400)
    policy = POLICIES[name](E, trace if POLICIES[name].looks_ahead else None)
    ties = 0
    for now, ids in enumerate(trace, 1):
        policy.called(counts(ids))
        residents = torch.randperm(E)[:6].tolist()
        worth = {e: REFERENCES[name](trace, now, e) for e in residents}
        if name == "usage":  # sums in another order
            values = sorted(worth.values())
            if any(0 < b - a < 1e-12 for a, b in pairwise(values)):
                continue
        expected = sorted(residents, key=lambda e: (worth[e], last_use(trace[:now], e), e))
        ties += len(set(worth.values())) < len(worth)
        assert policy.ranked(residents) == expected
        assert policy.victim(residents) == expected[0]
    assert policy.victim([]) is None
    assert ties > 0


def test_the_average_does_not_fade() -> None:
    """Past the range of its common factor."""
    policy = POLICIES["usage"](2)
    for _ in range(100_000):
        policy.called({0: 3, 1: 1})
    assert policy.worth(0) / policy.worth(1) == pytest.approx(3)
    assert math.isfinite(policy.worth(0))


def simulate(name: str, trace: list[list[int]], num_slots: int) -> int:
    """Hits of calls that each fit into the slots, one expert after another."""
    residents: set[int] = set()
    hits = 0
    for now, ids in enumerate(trace, 1):
        needed = counts(ids)
        hits += len(residents & set(needed))
        for expert in sorted(needed, key=lambda e: (-needed[e], e)):
            if expert in residents:
                continue
            if len(residents) == num_slots:
                others = residents - set(needed)
                past = trace[:now]
                residents.remove(
                    min(
                        others,
                        key=lambda e: (REFERENCES[name](trace, now, e), last_use(past, e), e),
                    )
                )
            residents.add(expert)
    return hits


@pytest.mark.parametrize("num_slots", [3, 5, 9])
@pytest.mark.parametrize("name", POLICIES)
def test_hits_of_a_module(name: str, num_slots: int) -> None:
    trace = random_trace(60)
    given = trace if POLICIES[name].looks_ahead else None
    experts = pair(4, 5, E, num_slots=num_slots, policy=name, trace=given).offloaded
    for ids in trace:
        experts(torch.randn(1, 4), torch.tensor([ids]), torch.rand(1, 3))
    needed = sum(len(set(ids)) for ids in trace)
    assert experts.hits == simulate(name, trace, num_slots)
    assert experts.hits + experts.misses == needed
    assert experts.hit_rate == experts.hits / needed
    assert experts.bytes_read == experts.misses * experts._file.expert_bytes


def test_nothing_that_loads_on_demand_beats_the_oracle() -> None:
    trace = random_trace(300)
    hits = {name: simulate(name, trace, 4) for name in POLICIES}
    assert max(hits, key=lambda name: hits[name]) == "oracle"
    assert len(set(hits.values())) > 2


def test_an_oracle_is_asked_for_what_it_was_told() -> None:
    experts = pair(num_slots=3, policy="oracle", trace=[[1, 2], torch.tensor([3])]).offloaded
    x, weights = torch.randn(1, 8), torch.rand(1, 2)
    experts(x, torch.tensor([[2, 1]]), weights)
    with pytest.raises(ValueError, match=r"^offload: trace must .* \[0\] in call 1, got \[3\]"):
        experts(x, torch.tensor([[0, 0]]), weights)
    experts(x, torch.tensor([[3, 3]]), weights)
    with pytest.raises(ValueError, match=r"^offload: trace must .* in call 2, got no such call"):
        experts(x, torch.tensor([[3, 3]]), weights)


def test_backward_passes_are_calls() -> None:
    experts = pair(num_slots=3, policy="oracle", trace=[[1], [1], [4]]).offloaded
    x = torch.randn(1, 8, requires_grad=True)
    experts(x, torch.tensor([[1]]), torch.ones(1, 1)).sum().backward()
    experts(x, torch.tensor([[4]]), torch.ones(1, 1))
    assert (experts.hits, experts.misses) == (1, 2)
