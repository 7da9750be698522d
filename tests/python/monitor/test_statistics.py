"""The statistics of a routing: hand-worked numbers, slow loops, and what must not count."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from situations import COMPILED_TOKENS
from torchmoe.monitor import RoutingStatistics, routing_statistics
from torchmoe.nn import Capacity, MoE, Routing

INTEGERS = ("tokens_per_expert", "kept_per_expert", "dead_experts")
T, E, K = 37, 5, 2


def count(ids: Tensor, num_experts: int) -> Tensor:
    return torch.stack([(ids == expert).sum() for expert in range(num_experts)])


def make_routing(
    logits: Tensor,
    selected: Tensor,
    indices: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Routing:
    indices = selected if indices is None else indices
    experts = logits.shape[1]
    return Routing(
        logits=logits,
        weights=torch.zeros(selected.shape, dtype=logits.dtype) if weights is None else weights,
        selected=selected,
        indices=indices,
        token_mask=token_mask,
        tokens_per_expert=count(selected, experts),
        kept_per_expert=count(indices, experts),
        losses={},
        statistics=None,
        details={},
    )


def draw(
    *, capacity: bool, masked: bool, experts: int = E, tokens: int = T, dtype: torch.dtype
) -> Routing:
    """A routing with dropped and rerouted slots, unused experts and garbage at masked tokens."""
    logits = 3 * torch.randn(tokens, experts, dtype=dtype)
    logits[:, 0] -= 20  # a dead expert, if there is a choice
    weights = torch.rand(tokens, K, dtype=dtype)
    selected = logits.topk(min(K, experts)).indices
    if experts < K:
        selected = torch.cat([selected, torch.full((tokens, K - experts), -1)], dim=1)
    mask = torch.rand(tokens) < 0.7 if masked else None
    if mask is not None:
        logits[~mask], weights[~mask], selected[~mask] = math.nan, math.nan, -1
    indices = selected
    if capacity:
        fate = torch.rand(tokens, K)
        moved = torch.where(fate < 0.5, (selected + 1) % experts, selected)
        indices = torch.where(fate < 0.3, -1, moved).where(selected >= 0, -1)
    return make_routing(logits, selected, indices, weights=weights, token_mask=mask)


def slowly(routing: Routing) -> dict[str, float | Tensor]:
    """Every statistic by its definition, token by token, with Python's floats."""
    tokens, experts = routing.logits.shape
    mask = routing.token_mask
    counted = [t for t in range(tokens) if mask is None or mask[t]]
    load = routing.tokens_per_expert.tolist()
    named = dropped = rerouted = 0
    for wanted, got in zip(
        routing.selected.flatten().tolist(), routing.indices.flatten().tolist(), strict=True
    ):
        if 0 <= wanted < experts:
            named += 1
            dropped += not 0 <= got < experts
            rerouted += 0 <= got < experts and got != wanted
    logits = [routing.logits[t].tolist() for t in counted]
    entropies = []
    for row in logits:
        exps = [math.exp(logit - max(row)) for logit in row]
        probs = [e / sum(exps) for e in exps]
        entropies.append(-sum(p * math.log(p) for p in probs if p > 0))
    mean = sum(load) / experts
    slots = sum(load)
    return {
        "tokens_per_expert": routing.tokens_per_expert,
        "kept_per_expert": routing.kept_per_expert,
        "dropped_share": dropped / max(named, 1),
        "rerouted_share": rerouted / max(named, 1),
        "max_violation": max(load) / mean - 1 if slots else 0,
        "load_cv": math.sqrt(sum((n - mean) ** 2 for n in load) / experts) / mean if slots else 0,
        "load_entropy": -sum(n / slots * math.log(n / slots) for n in load if n),
        "routing_entropy": sum(entropies) / max(len(counted), 1),
        "dead_experts": load.count(0) if slots else 0,
        "first_choice_weight": sum(routing.weights[t, 0].item() for t in counted)
        / max(len(counted), 1),
        "logit_range": max(map(max, logits)) - min(map(min, logits)) if logits else 0,
    }


def check(routing: Routing) -> None:
    eps = torch.finfo(routing.logits.dtype).eps
    experts = routing.logits.shape[1]
    for name, expected in slowly(routing).items():
        actual = getattr(routing_statistics(routing), name)
        if name in INTEGERS:
            assert actual.dtype == torch.int64
            assert torch.equal(actual, torch.as_tensor(expected)), name
            continue
        assert actual.dtype == torch.float64
        # A log-probability is off by some eps of its size, which is at most that of the logits
        # (below 50 here); times a probability and added over E experts. Means add less than that.
        assert_close(actual.item(), expected, rtol=0, atol=50 * (experts + 4) * eps, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("capacity", [False, True])
@pytest.mark.parametrize("experts", [1, E, 70])
def test_values(capacity: bool, masked: bool, experts: int, dtype: torch.dtype) -> None:
    check(draw(capacity=capacity, masked=masked, experts=experts, dtype=dtype))


def test_hand_worked_numbers() -> None:
    """Four tokens, of which the last does not count; experts 0 to 3.

    Slots: (0, 1) kept; (0, 2) the second rerouted to 3; (1, 0) the first dropped.
    """
    third = math.log(1 / 3)
    logits = torch.tensor(
        [[0.0, 0, 0, 0], [0, 0, -math.inf, -math.inf], [third, 0, -math.inf, third], [math.nan] * 4]
    )
    got = routing_statistics(
        make_routing(
            logits,
            torch.tensor([[0, 1], [0, 2], [1, 0], [-1, -1]]),
            torch.tensor([[0, 1], [0, 3], [-1, 0], [-1, -1]]),
            weights=torch.tensor([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0], [math.nan, 7.0]]),
            token_mask=torch.tensor([True, True, True, False]),
        )
    )
    assert got.tokens_per_expert.tolist() == [3, 2, 1, 0]
    assert got.kept_per_expert.tolist() == [3, 1, 0, 1]
    # The mean load is 1.5, the deviations 1.5, 0.5, -0.5, -1.5; the shares 1/2, 1/3, 1/6, 0.
    load_entropy = math.log(2) / 2 + math.log(3) / 3 + math.log(6) / 6
    # The probabilities are 1/4 four times, 1/2 twice, and 1/5, 3/5, 1/5.
    last = -(0.4 * math.log(0.2) + 0.6 * math.log(0.6))
    for name, value in {
        "dropped_share": 1 / 6,
        "rerouted_share": 1 / 6,
        "max_violation": 1.0,
        "load_cv": math.sqrt(1.25) / 1.5,
        "load_entropy": load_entropy,
        "routing_entropy": (math.log(4) + math.log(2) + last) / 3,
        "dead_experts": 1,
        "first_choice_weight": 0.75,
        "logit_range": math.inf,
    }.items():
        # float32 logits, probabilities of a few experts
        assert getattr(got, name).item() == pytest.approx(value, rel=1e-6), name


def test_even_load_is_exact() -> None:
    ids = torch.arange(49).reshape(49, 1)
    got = routing_statistics(make_routing(torch.zeros(49, 49), ids))
    assert got.max_violation == 0
    assert got.load_cv == 0
    assert got.dead_experts == 0
    assert got.logit_range == 0
    assert_close(got.load_entropy.item(), math.log(49), rtol=1e-14, atol=0)
    assert_close(got.routing_entropy.item(), math.log(49), rtol=1e-6, atol=0)


def test_one_expert_in_use() -> None:
    got = routing_statistics(make_routing(torch.zeros(9, E), torch.full((9, 1), 3)))
    assert got.max_violation == E - 1
    assert got.load_cv == math.sqrt(E - 1)
    assert got.load_entropy == 0
    assert got.dead_experts == E - 1


def test_the_same_ids_in_another_tensor_count_as_no_capacity() -> None:
    routing = draw(capacity=False, masked=True, dtype=torch.float64)
    same = routing_statistics(routing._replace(indices=routing.indices.clone()))
    for one, other in zip(routing_statistics(routing), same, strict=True):
        assert torch.equal(one, other)


def test_ids_out_of_range_are_no_slots() -> None:
    """Other frameworks mark a slot that is not routed with E, and assistance leaves a column."""
    selected = torch.tensor([[0, 1, E], [2, E + 7, 3], [1, -1, -5]])
    indices = torch.tensor([[0, 2, 4], [E, 3, 3], [-2, -1, 1]])
    got = routing_statistics(make_routing(torch.zeros(3, E), selected, indices))
    # Named are 0, 1, 2, 3, 1: kept, rerouted, dropped, kept, dropped.
    assert_close(got.dropped_share.item(), 2 / 5)
    assert_close(got.rerouted_share.item(), 1 / 5)


def test_extreme_logits_keep_a_finite_entropy() -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0], [0.0, -200.0, -math.inf]])
    got = routing_statistics(make_routing(logits, torch.tensor([[0], [0]])))
    assert got.routing_entropy == 0


@pytest.mark.parametrize("capacity", [False, True])
@pytest.mark.parametrize("kind", ["empty", "masked"])
def test_zero_where_nothing_counts(kind: str, capacity: bool) -> None:
    tokens = 0 if kind == "empty" else T
    ids = torch.full((tokens, K), -1)
    got = routing_statistics(
        make_routing(
            torch.full((tokens, E), math.nan),
            ids,
            ids.clone() if capacity else None,
            weights=torch.full((tokens, K), math.nan),
            token_mask=None if kind == "empty" else torch.zeros(tokens, dtype=torch.bool),
        )
    )
    for value in got:
        assert torch.equal(value, torch.zeros_like(value))
    assert [value.dtype for value in got] == dtypes(
        routing_statistics(draw(capacity=True, masked=True, dtype=torch.float32))
    )


def dtypes(statistics: RoutingStatistics) -> list[torch.dtype]:
    return [value.dtype for value in statistics]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("capacity", [False, True])
@pytest.mark.parametrize("tokens", [0, T])
def test_nothing_is_read_from_the_device(tokens: int, capacity: bool, masked: bool) -> None:
    """A tensor on meta has no data: whatever waited for some would raise."""
    routing = draw(capacity=capacity, masked=masked, tokens=tokens, dtype=torch.float32)
    fields = {
        name: value.to("meta")
        for name, value in routing._asdict().items()
        if torch.is_tensor(value)
    }
    if not capacity:
        fields["indices"] = fields["selected"]
    got = routing_statistics(routing._replace(**fields))
    assert all(value.is_meta for value in got)
    assert [value.shape for value in got] == [(E,)] * 2 + [()] * 9
    assert dtypes(got) == dtypes(routing_statistics(routing))


def test_no_gradient_is_kept() -> None:
    routing = MoE(4, 6, E, K, capacity=Capacity(1.0))(torch.randn(T, 4)).routing
    assert routing.logits.requires_grad
    assert routing.weights.requires_grad
    assert not any(value.requires_grad for value in routing_statistics(routing))


def test_the_same_in_inference_mode() -> None:
    routing = draw(capacity=True, masked=True, dtype=torch.float32)
    with torch.inference_mode():
        got = routing_statistics(
            Routing(*(v.clone() if torch.is_tensor(v) else v for v in routing))
        )
    for one, other in zip(got, routing_statistics(routing), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_over_capacity(masked: bool) -> None:
    moe = MoE(4, 6, E, K, capacity=Capacity(0.5))
    mask = torch.rand(T) < 0.7 if masked else None
    routing = moe(torch.randn(T, 4), token_mask=mask).routing
    got = routing_statistics(routing)
    wanted, kept = routing.tokens_per_expert.sum().item(), routing.kept_per_expert.sum().item()
    assert got.dropped_share.item() == (wanted - kept) / wanted
    assert got.dropped_share > 0
    assert got.rerouted_share == 0
    check(routing)


def test_compiles_once_for_every_token_count() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(routing_statistics, fullgraph=True, dynamic=True, backend=counter)
    for tokens in COMPILED_TOKENS:
        routing = draw(capacity=True, masked=True, tokens=tokens, dtype=torch.float32)
        for one, other in zip(compiled(routing), routing_statistics(routing), strict=True):
            assert torch.equal(one, other)
    assert counter.frame_count == 1


def test_the_same_bits_for_any_number_of_threads() -> None:
    # More elements than torch gives to one thread.
    routing = draw(capacity=True, masked=True, tokens=10_007, dtype=torch.float32)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(routing_statistics(routing))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
