"""RoutingCache: what is found, what a hit gives, and when anything moves."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from torchmoe import RoutingCache, ops
from torchmoe.nn import (
    Assistance,
    Balance,
    Capacity,
    ContextRouter,
    ExpertChoiceRouter,
    Gate,
    HashRouter,
    MoE,
    Router,
    RouterOutput,
    SequenceRouter,
)

H, I, E, K = 16, 24, 8, 2  # noqa: E741  the glossary's letter


def layer(cache: RoutingCache | None = None, **settings: Any) -> MoE:
    return MoE(H, I, E, K, cache=RoutingCache(64) if cache is None else cache, **settings)


def cache_of(moe: MoE) -> RoutingCache:
    assert moe.cache is not None
    return moe.cache


def tensors_of(cache: RoutingCache) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in cache.state_dict().items()}


def at_cosine(x: Tensor, cosine: float) -> Tensor:
    """Rows of the same lengths at that cosine, in random directions."""
    x = x.double()
    across = torch.randn_like(x)
    across -= (across * x).sum(1, keepdim=True) / x.square().sum(1, keepdim=True) * x
    across *= x.norm(dim=1, keepdim=True) / across.norm(dim=1, keepdim=True)
    return (cosine * x + math.sqrt(1 - cosine**2) * across).float()


@pytest.mark.parametrize(
    ("cosine", "least", "most"),
    [(1.0, 1.0, 1.0), (0.9999, 0.9, 1.0), (0.99, 0.5, 1.0), (0.9801, 0.3, 1.0), (0.979, 0.0, 0.0)],
)
@pytest.mark.parametrize("size", [H, 300])
def test_how_many_find_their_entry(cosine: float, least: float, most: float, size: int) -> None:
    moe = MoE(size, I, E, K, cache=RoutingCache(2000))
    x = torch.randn(2000, size)
    moe.update(moe(x).routing)
    queries = x if cosine == 1 else at_cosine(x, cosine)
    found = moe(queries).routing.details["cache_hit"]
    share = (found == torch.arange(2000)).double().mean().item() if size > H else None
    any_found = (found >= 0).double().mean().item()
    if share is not None:  # so many dimensions that no two keys are similar
        assert least <= share <= most
    assert least <= any_found
    # Every entry that was found is similar: in few dimensions it may be another one.
    hits = found >= 0
    a, b = queries[hits].double(), x[found[hits]].double()
    assert (torch.nn.functional.cosine_similarity(a, b) >= 0.98 - 1e-9).all()


def test_a_similarity_that_is_lower_has_more_tables() -> None:
    """At the similarity itself, half are found."""
    for similarity in (0.999, 0.98, 0.95, 0.9):
        moe = MoE(200, I, E, K, cache=RoutingCache(1000, similarity))
        x = torch.randn(1000, 200)
        moe.update(moe(x).routing)
        found = moe(at_cosine(x, similarity + 1e-5)).routing.details["cache_hit"]
        assert (found >= 0).double().mean() > 0.42, similarity


def test_length_counts() -> None:
    moe = layer()
    x = torch.randn(30, H)
    moe.update(moe(x).routing)
    for factor, is_hit in ((0.97, False), (0.985, True), (1.015, True), (1.03, False)):
        assert ((moe(factor * x).routing.details["cache_hit"] >= 0) == is_hit).all(), factor


def test_a_hit_has_the_entrys_ids_and_weights_of_its_own() -> None:
    """Similar tokens that the router would route otherwise, and its gradient."""
    moe = layer(RoutingCache(64, 0.9), balance=Balance(0.01))
    x = torch.randn(64, H)
    first = moe(x).routing
    moe.update(first)
    near = at_cosine(x, 0.95)
    output = moe(near)
    routing = output.routing
    entry = routing.details["cache_hit"]
    hits = entry >= 0
    own = ops.select_experts(routing.logits, K)
    assert (own[hits] != routing.selected[hits]).any()
    assert torch.equal(routing.selected, first.selected[entry].where(hits[:, None], own))
    names = {"score_function": "softmax", "normalize": "topk", "estimator": "exact"}
    expected = ops.gate_weights(routing.logits, routing.selected, **names)
    assert torch.equal(routing.weights, expected)
    assert torch.equal(
        routing.tokens_per_expert, torch.bincount(routing.selected.flatten(), minlength=E)
    )
    output.hidden_states.square().sum().backward()
    grad = moe.router.weight.grad
    assert grad is not None
    assert (grad.abs().sum(1) > 0).all()


def test_nothing_moves_in_a_forward_pass() -> None:
    moe = layer()
    x = torch.randn(3, 10, H)
    moe.update(moe(x).routing)
    cache = cache_of(moe)
    before = tensors_of(cache)
    for queries in (x, torch.randn(3, 10, H), 1.01 * x):
        moe(queries)
    assert tensors_of(cache) == before
    assert (cache.hits, cache.lookups, len(cache)) == (0, 30, 30)
    for _ in range(2):
        moe.update(moe(x).routing)
    assert (cache.hits, cache.lookups, len(cache)) == (60, 90, 30)
    assert cache.hit_rate == 60 / 90
    assert cache.entry(7).uses == 3


def test_update_in_evaluation_moves_the_cache_alone() -> None:
    moe = layer(
        router=Router(H, E, track_usage=True), balance=Balance(0.01, selection_bias_rate=0.1)
    ).eval()
    cache, before = cache_of(moe), copy.deepcopy(moe.state_dict())
    with torch.inference_mode():
        cache.update(moe(torch.randn(9, H)).routing)
    assert len(cache) == 9
    assert all(torch.equal(value, before[name]) for name, value in moe.state_dict().items())


def test_micro_batches_are_one_update() -> None:
    a, b = torch.randn(6, H), torch.randn(5, H)
    one, two = layer(), layer()
    two.load_state_dict(one.state_dict())
    routings = [one(a).routing, one(b).routing]
    one.update(routings)
    two.update(routings[0])
    two.update(routings[1])
    assert tensors_of(cache_of(one)) == tensors_of(cache_of(two))


@pytest.mark.parametrize(("eviction", "kept"), [("lru", [3, 4, 2]), ("lfu", [0, 4, 2])])
def test_eviction_is_in_token_order(eviction: str, kept: list[int]) -> None:
    moe = layer(RoutingCache(3, eviction=eviction))
    x = torch.randn(5, H)
    moe.update(moe(x[[0, 0, 0, 1, 2, 2]]).routing)
    moe.update(moe(x[[3]]).routing)  # in the place of 0 (lru), of 1 (lfu)
    moe.update(moe(x[[2, 4]]).routing)
    keys = [cache_of(moe).entry(i).key for i in range(3)]
    assert [int((x - key).abs().sum(1).argmin()) for key in keys] == kept
    assert len(cache_of(moe)) == 3


def test_masked_tokens_are_neither_looked_up_nor_remembered() -> None:
    moe = layer()
    x = torch.randn(4, 5, H)
    mask = torch.rand(4, 5) < 0.5
    x[~mask] = math.nan
    routing = moe(x, token_mask=mask).routing
    moe.update(routing)
    counted = int(mask.sum())
    assert (len(cache_of(moe)), cache_of(moe).lookups) == (counted, counted)
    again = moe(x, token_mask=mask).routing
    assert ((again.details["cache_hit"] >= 0) == mask.flatten()).all()
    assert torch.equal(again.selected, routing.selected)
    nothing = moe(x, token_mask=torch.zeros(4, 5, dtype=torch.bool)).routing
    moe.update(nothing)
    assert cache_of(moe).lookups == counted


def test_no_tokens() -> None:
    moe = layer()
    moe.update(moe(torch.randn(0, H)).routing)
    moe.update(moe(torch.randn(4, H)).routing)
    moe.update(moe(torch.randn(2, 0, H)).routing)
    assert (len(cache_of(moe)), cache_of(moe).lookups) == (4, 4)


def test_a_sequence_is_one_lookup() -> None:
    moe = layer(RoutingCache(8), router=SequenceRouter(Router(H, E), pooling="mean"))
    x = torch.randn(3, 5, H)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]]).bool()
    first = moe(x, token_mask=mask).routing
    moe.update(first)
    cache = cache_of(moe)
    assert (len(cache), cache.lookups) == (2, 2)
    assert torch.equal(cache.entry(1).key, first.details["gate_input"][2])
    again = moe(x, token_mask=mask).routing
    expected = torch.tensor([0, -1, 1]).repeat_interleave(5).masked_fill(~mask.flatten(), -1)
    assert torch.equal(again.details["cache_hit"], expected)
    assert torch.equal(again.selected, first.selected)
    # The same sequences in another batch, of another length and order of tokens.
    moved = moe(x.flip(1), token_mask=mask.flip(1)).routing.details["cache_hit"]
    assert torch.equal(moved, expected.view(3, 5).flip(1).flatten())
    moe.update(moe(torch.randn(2, 0, H)).routing)
    assert cache.lookups == 2


class Counting(Router):
    """Counts its calls."""

    calls = 0

    def forward(self, x: Tensor, **rest: Any) -> Any:
        self.calls += 1
        return super().forward(x, **rest)


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_weights_are_reused_without_the_router(kind: str) -> None:
    inside = Counting(H, E, bias=True)
    router = inside if kind == "token" else SequenceRouter(inside)
    moe = layer(
        RoutingCache(64, reuse="weights"),
        router=router,
        balance=Balance(0.01, z_loss_weight=0.1),
        capacity=Capacity(1.0, priority="weight"),
    ).eval()
    x = torch.randn(4, 5, H)
    cache = cache_of(moe)
    first = moe(x)
    cache.update(first.routing)
    inside.calls = 0
    second = moe(x)
    assert inside.calls == 0
    assert second.routing.logits.isnan().all()
    assert second.aux_loss.item() == 0
    assert set(second.routing.losses) == set(first.routing.losses)
    assert all(loss.isnan() for loss in second.routing.losses.values())
    assert torch.equal(second.hidden_states, first.hidden_states)
    assert torch.equal(second.routing.weights, first.routing.weights)
    assert torch.equal(second.routing.kept_per_expert, first.routing.kept_per_expert)
    # One that misses is enough for the router to run for all.
    x = torch.cat([x[:3], torch.randn(1, 5, H)])
    third = moe(x)
    assert inside.calls == 1
    assert not third.routing.logits.isnan().any()
    inside.calls = 0
    cache.update(second.routing)
    assert inside.calls == 0  # nothing new, and nothing has changed
    assert (cache.hits, cache.lookups) == ((20, 40) if kind == "token" else (4, 8))


def test_reused_weights_of_a_similar_token() -> None:
    moe = layer(RoutingCache(64, 0.9, reuse="weights")).eval()
    x = torch.randn(64, H)
    first = moe(x).routing
    cache_of(moe).update(first)
    near = 1.001 * x
    assert torch.equal(moe(near).routing.weights, first.weights)


def test_a_derivative_through_a_router_that_was_left_out_is_refused() -> None:
    moe = layer(RoutingCache(64, reuse="weights")).eval()
    x = torch.randn(6, H)
    cache_of(moe).update(moe(x).routing)
    message = 'RoutingCache: reuse must be "ids" where a derivative is taken, got a '
    with pytest.raises(RuntimeError, match=message + "gradient"):
        moe(x).hidden_states.sum().backward()
    with pytest.raises(RuntimeError, match=message + "gradient"):
        torch.func.grad(lambda v: moe(v).hidden_states.sum())(x)
    with pytest.raises(RuntimeError, match=message + "tangent"):
        torch.func.jvp(lambda v: moe(v).hidden_states, (x,), (x,))
    moe.router.requires_grad_(False)
    moe(x).hidden_states.sum().backward()  # the router would have had none
    with torch.no_grad():
        assert not moe(x).hidden_states.requires_grad


def test_weights_are_not_reused_in_training() -> None:
    moe = layer(RoutingCache(8, reuse="weights"))
    with pytest.raises(
        RuntimeError, match=r'^RoutingCache: reuse must be "ids" in training, .*eval'
    ):
        moe(torch.randn(3, H))


def test_a_repeated_decision_is_not_looked_up() -> None:
    moe = layer()
    x = torch.randn(6, H)
    first = moe(x).routing
    moe.update(first)
    again = moe(x, decision=first.decision).routing
    assert "cache_hit" not in again.details
    moe.update(again)
    assert cache_of(moe).lookups == 6
    assert math.isnan(cache_of(moe).second_look(again))


def test_the_second_look() -> None:
    moe = layer(RoutingCache(64, 0.9)).eval()
    x = torch.randn(64, H)
    cache = cache_of(moe)
    first = moe(x).routing
    assert math.isnan(cache.second_look(first))
    cache.update(first)
    assert cache.second_look(moe(x).routing) == 1.0
    near = moe(at_cosine(x, 0.92)).routing
    hits = near.details["cache_hit"] >= 0
    own = ops.select_experts(near.logits, K)[hits]
    agreeing = (own.unsqueeze(2) == near.selected[hits].unsqueeze(1)).any(2).double().mean().item()
    assert 0 < agreeing < 1
    assert cache.second_look(near) == pytest.approx(agreeing)
    assert 0 < cache.second_look(near, sample=3) <= 1


def test_bytes() -> None:
    moe = layer(RoutingCache(100))
    cache = cache_of(moe)
    assert cache.nbytes == 0
    moe.update(moe(torch.randn(2, H)).routing)
    entries = 100 * (4 * H + 8 * 2 + 8 * 2 + 8 * K + 4 * K)
    assert cache.nbytes == entries + 2 * 16 * 4 * H + 4 * E * H


def test_copies_have_caches_of_their_own() -> None:
    moe = layer()
    x = torch.randn(5, H)
    moe.update(moe(x).routing)
    buffer = io.BytesIO()
    torch.save(moe, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe)), loaded):
        assert tensors_of(cache_of(other)) == tensors_of(cache_of(moe))
        other.update(other(torch.randn(5, H)).routing)
        assert (len(cache_of(other)), len(cache_of(moe))) == (10, 5)
    alone = copy.deepcopy(cache_of(moe))
    assert tensors_of(alone) == tensors_of(cache_of(moe))
    with pytest.raises(RuntimeError, match=r"^RoutingCache: the cache must belong to a layer"):
        alone.update(moe(x).routing)
    MoE(H, I, E, K, cache=alone)


def test_one_cache_for_one_layer() -> None:
    with pytest.raises(ValueError, match=r"^MoE: cache must be a cache of its own, got one"):
        layer(cache_of(layer()))


def test_a_trained_layer_is_given_one() -> None:
    moe = MoE(H, I, E, K)
    moe.cache = RoutingCache(8)
    moe.update(moe(torch.randn(5, H)).routing)
    assert len(cache_of(moe)) == 5
    with pytest.raises(ValueError, match=r"^MoE: cache must be a cache of its own"):
        moe.cache = cache_of(layer())
    with pytest.raises(TypeError, match=r"^MoE: cache must be a RoutingCache or None, such as"):
        moe.cache = 8  # type: ignore[assignment]
    assert len(cache_of(moe)) == 5
    moe.cache = None
    assert "cache_hit" not in moe(torch.randn(5, H)).routing.details
    drawing = MoE(H, I, E, K, gate=Gate(estimator="gumbel_straight_through"))
    with pytest.raises(ValueError, match=r"^MoE: cache must be None for the estimator"):
        drawing.cache = RoutingCache(8)
    assert drawing.cache is None


def test_it_is_cleared_with_the_layer_and_saved_by_itself() -> None:
    moe = layer()
    assert not any("cache" in name for name in moe.state_dict())
    moe.update(moe(torch.randn(5, H)).routing)
    cache = cache_of(moe)
    saved, weights = cache.state_dict(), moe.state_dict()
    moe.load_state_dict(weights)
    assert (len(cache), cache.lookups, cache.nbytes) == (0, 0, 0)
    cache.load_state_dict(saved)
    assert (len(cache), cache.lookups) == (5, 5)
    moe.reset_parameters()
    assert len(cache) == 0
    empty = cache.state_dict()
    cache.load_state_dict(saved)
    cache.load_state_dict(empty)
    assert len(cache) == 0


def test_what_it_does_not_load() -> None:
    moe = layer()
    moe.update(moe(torch.randn(5, H)).routing)
    saved = cache_of(moe).state_dict()
    for state, message in (
        ({}, "state_dict must have hits, invalidated, lookups, got $"),
        (saved | {"more": 1}, "state_dict must have dtype, hits, .*, got .*more"),
        ({k: v for k, v in saved.items() if k != "ids"}, "state_dict must have .*ids"),
        (saved | {"keys": saved["keys"][1:]}, r'state_dict\["keys"\] must be .*\[64, 16\], got'),
        (saved | {"ids": saved["ids"][:, 1:]}, r'state_dict\["ids"\] must be .*64, 2\], got'),
        (saved | {"uses": saved["uses"].float()}, r'state_dict\["uses"\] must be .*got'),
    ):
        with pytest.raises(ValueError, match="^RoutingCache: " + message):
            cache_of(moe).load_state_dict(state)
    assert len(cache_of(moe)) == 5


def test_gate_inputs_of_another_size_or_type_begin_anew() -> None:
    moe = layer(router=torch.nn.Linear(H, E))
    moe.update(moe(torch.randn(5, H)).routing)
    moe.double()
    x = torch.randn(3, H, dtype=torch.float64)
    assert (moe(x).routing.details["cache_hit"] < 0).all()
    moe.update(moe(x).routing)
    assert len(cache_of(moe)) == 3
    assert cache_of(moe).entry(0).key.dtype == torch.float64
    assert (moe(x).routing.details["cache_hit"] >= 0).all()


def test_what_cannot_be_looked_up() -> None:
    moe = layer(router=torch.nn.Embedding(10, E))
    with pytest.raises(RuntimeError, match=r"^RoutingCache: gate input must be floating-point"):
        moe(torch.randn(4, H), router_input=torch.arange(4))
    moe = layer()
    with pytest.raises(RuntimeError, match=r"^RoutingCache: gate input must be looked up.*vmap"):
        torch.func.vmap(lambda x: moe(x).hidden_states)(torch.randn(2, 3, H))
    for number in (0, 64):
        with pytest.raises(IndexError, match=f"^RoutingCache: number must be .* got {number}"):
            cache_of(moe).entry(number)


class Neighbours(ContextRouter):
    """Scores pairs of tokens."""

    num_experts = E

    def forward(self, x: Tensor, *_: Any) -> RouterOutput:
        return RouterOutput(x[..., :E])


class Pairs(ContextRouter):
    """Scores the mean of two tokens that follow one another."""

    num_experts = E

    def __init__(self, rows: slice = slice(None), calls: int = 1) -> None:
        super().__init__()
        self.scoring = Router(H, E)
        self.rows, self.calls = rows, calls

    def forward(
        self,
        x: Tensor,
        router_input: Tensor | None = None,
        token_mask: Tensor | None = None,
        *,
        scorer: Any,
    ) -> RouterOutput:
        logits = torch.zeros(len(x), E)
        for _ in range(self.calls):
            scored = scorer(self.scoring, x.view(-1, 2, H).mean(1)[self.rows]).logits
            logits = scored.repeat_interleave(2, 0) if len(scored) == len(x) // 2 else logits
        return RouterOutput(logits)


def test_a_router_of_ones_own() -> None:
    moe = layer(router=Pairs())
    x = torch.randn(6, H)
    moe.update(moe(x).routing)
    other = torch.cat([x[2:4].flip(0), torch.randn(2, H)])
    assert moe(other).routing.details["cache_hit"].tolist() == [1, 1, -1, -1]
    assert len(cache_of(moe)) == 3
    without = MoE(H, I, E, K, router=Pairs())
    assert without(x).routing.selected.shape == (6, K)


def test_a_router_of_ones_own_that_scores_otherwise() -> None:
    x = torch.randn(6, H)
    with pytest.raises(RuntimeError, match=r"^MoE: router must call scorer .* got no call"):
        layer(router=Pairs(calls=0))(x)
    with pytest.raises(RuntimeError, match=r"^RoutingCache: gate input must be .*6 tokens.*got 0"):
        layer(router=Pairs(rows=slice(0)))(x)
    with pytest.raises(RuntimeError, match=r"^RoutingCache: gate input must be .*8 tokens.*got 3"):
        layer(router=Pairs(rows=slice(3)))(torch.randn(8, H))


def refused() -> Iterator[tuple[str, str, dict[str, Any]]]:
    weights = {"cache": RoutingCache(8, reuse="weights")}
    ids = {"cache": RoutingCache(8)}
    yield "cache", "HashRouter, which chooses", ids | {"router": HashRouter(E, K)}
    yield "cache", "which chooses", ids | {"router": ExpertChoiceRouter(Router(H, E), K)}
    yield "cache", "Neighbours, which scores no", ids | {"router": Neighbours()}
    yield "cache", "which draws", ids | {"gate": Gate(estimator="gumbel_straight_through")}
    yield "cache.reuse", "next_best", weights | {"capacity": Capacity(1.0, overflow="next_best")}
    yield "cache.reuse", "after_drop", weights | {"capacity": Capacity(1.0, normalize="after_drop")}
    yield "cache.reuse", "assistance", weights | {"assistance": Assistance([*range(1, E), 0])}
    yield "cache.reuse", "may read", weights | {"gate": Gate(estimator="straight_through_dense")}


@pytest.mark.parametrize(("argument", "reason", "settings"), [*refused()])
def test_parts_that_do_not_go_with_it(argument: str, reason: str, settings: dict[str, Any]) -> None:
    if argument == "cache.reuse":
        layer(**settings | {"cache": RoutingCache(8)})
    with pytest.raises(ValueError, match=rf"^MoE: {argument} must be .*{reason}.*, got "):
        MoE(H, I, E, K, **settings)


def test_it_is_shown() -> None:
    assert repr(RoutingCache(8)) == "RoutingCache(8)"
    shown = repr(layer(RoutingCache(8, 0.9, eviction="lfu", reuse="weights")))
    assert "cache=RoutingCache(8, similarity=0.9, eviction='lfu', reuse='weights')" in shown


def test_weights_are_those_of_the_router_as_it_is() -> None:
    """After a change that turns no choice around, and an update after it."""
    moe = layer(RoutingCache(64, reuse="weights")).eval()
    x = torch.randn(20, H)
    cache = cache_of(moe)
    cache.update(moe(x).routing)
    with torch.no_grad():
        moe.router.weight *= 1.1
    expected = moe(x).routing
    assert not expected.logits.isnan().any()
    assert (expected.details["cache_hit"] >= 0).all()
    cache.update(expected)
    actual = moe(x).routing
    assert actual.logits.isnan().all()
    assert torch.equal(actual.weights, expected.weights)
    assert cache.invalidated == 0
