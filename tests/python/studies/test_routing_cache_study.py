"""The study of the routing cache: what it counts, the queries it makes, and its formula."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from classified import lively, random_texts
from refused import refused
from studies.classification.texts import CLS, Texts
from studies.routing_cache import program, queries, report, stream, text, timing
from studies.routing_cache.caching import Tally, compared, entries_of, put_caches, update
from studies.routing_cache.scale import FULL, SIMILARITIES, SMALL, USUAL
from torchmoe import RoutingCache, ops
from torchmoe.nn import MoE, Router, SequenceRouter
from train_lm import ByteLM
from training.corpus import Document, Domain, Text
from training.settings import Settings

TINY = replace(Settings(), layers=2, hidden_size=32, intermediate_size=16, experts=4, steps=4)


def made_up_text(size: int = 40_000) -> Text:
    """Two domains in which no window comes twice."""
    draw = np.random.default_rng(0)

    def document(name: str, low: int, high: int) -> Document:
        return Document(name, bytes(draw.integers(low, high, size).tolist()).decode())

    return Text.of(
        [
            Domain("low", [document("a", 40, 80)], [document("b", 40, 80)]),
            Domain("high", [document("c", 60, 120)], [document("d", 60, 120)]),
        ]
    )


# ---- caches for a model


def test_every_layer_gets_a_cache_and_keeps_its_parts() -> None:
    torch.manual_seed(0)
    model = ByteLM(TINY.model()).eval()
    nn.init.normal_(model.head.weight)
    tokens = torch.randint(256, (2, 20))
    before, state = model(tokens).logits, model.state_dict()
    parameters = list(model.parameters())
    caches = put_caches(model, lambda: RoutingCache(8))
    assert [moe.cache for moe in model.moes] == caches
    assert len({id(cache) for cache in caches}) == 2
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.state_dict().keys() == state.keys()
    assert not any(moe.training for moe in model.moes)
    assert torch.equal(model(tokens).logits, before)  # an empty cache finds nothing


@pytest.mark.parametrize("router", queries.ROUTERS)
def test_the_tally_counts_texts(router: str) -> None:
    """A gate input is a whole text, padding or not."""
    model = lively(router)
    caches = put_caches(model, lambda: RoutingCache(8))
    some = random_texts(50, 80, 65)
    update(caches, model(some.part(0, 2)).routings)
    tally = Tally(caches)
    routings = model(some).routings
    tally.add(routings)
    assert [entries_of(one).tolist()[0] for one in routings] == [0, 0]
    assert entries_of(routings[0]).tolist() == [0, 1, -1]
    assert tally.hit_rate.tolist() == [2 / 3, 2 / 3]
    assert tally.agreement.tolist() == [1, 1]
    assert tally.complete.tolist() == [0, 0]
    tally.add(model(some.part(0, 2)).routings)
    assert tally.complete.tolist() == [1, 1]
    with torch.no_grad():  # what it was given then is no longer what it would be given
        for block in model.blocks:
            block.moe.router.router.weight.neg_()
    again = Tally(caches)
    again.add(routings)
    assert again.agreement.max() < 1


def test_the_tally_of_tokens_without_a_hit() -> None:
    moe = MoE(16, 8, 4, 2, cache=RoutingCache(8))
    holder = nn.ModuleList([moe])
    caches = put_caches(holder, lambda: RoutingCache(8))
    tally = Tally(caches)
    tally.add([holder[0](torch.randn(5, 16)).routing])
    assert tally.hit_rate.tolist() == [0]
    assert np.isnan(tally.agreement).all()


def test_the_keys_that_a_lookup_compares() -> None:
    cache = RoutingCache(64, 0.9)
    moe = MoE(4, 8, 4, 2, cache=cache)
    x = torch.randn(40, 4)
    cache.update(moe(x).routing)
    state = cache.state_dict()
    signatures = ops.cache_signatures(x, state["planes"])
    keys = [key for key in state["key_signatures"].tolist() if key[0] >= 0]
    counts = [
        sum(any(a == b for a, b in zip(row, key, strict=True)) for key in keys)
        for row in signatures.tolist()
    ]
    assert 1 < sum(counts) / 40 < len(keys)
    assert compared(cache, x) == pytest.approx(sum(counts) / 40)


# ---- texts that come again


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_a_paraphrase_changes_that_share_of_the_bytes(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    some = random_texts(*[100] * 60, 50)
    other = queries.paraphrased(some, share, generator)
    assert torch.equal(other.token_mask, some.token_mask)
    is_byte = some.token_mask & (some.tokens != CLS)
    changed = other.tokens != some.tokens
    assert not changed[~is_byte].any()
    # One byte in 256 is drawn as it was.
    assert changed[is_byte].double().mean().item() == pytest.approx(255 / 256 * share, abs=0.02)


def test_what_caches_make_of_texts() -> None:
    some = random_texts(50, 80, 65, 90)
    known, unseen = (
        queries.pick(some, torch.tensor([0, 2])),
        queries.pick(some, torch.tensor([1, 3])),
    )
    model = lively("sequence_mean")
    asked = {queries.EXACT: known, queries.UNSEEN: unseen}
    plain = {name: queries.bits(queries.forward(model, t)[0], t) for name, t in asked.items()}
    caching = copy.deepcopy(model)
    caches = put_caches(caching, lambda: RoutingCache(8, 0.9999))
    queries.forward(caching, known, caches)
    answers = queries.ask(caching, caches, asked, plain)
    exact, other = answers[queries.EXACT], answers[queries.UNSEEN]
    for numbers in (exact.hit_rate, exact.own, exact.agreement):
        assert numbers.tolist() == [1, 1]
    assert (exact.change, other.change) == (0, 0)  # the same experts, and no hit
    assert other.hit_rate.tolist() == [0, 0]
    assert [len(cache) for cache in caches] == [2, 2]  # asking moves nothing


def test_another_texts_entry_is_not_its_own() -> None:
    """With a similarity that everything has, the texts that are left over find one of another."""
    some = random_texts(50, 80, 65, 90)
    model = lively("sequence_mean")
    caches = put_caches(model, lambda: RoutingCache(2, 0.999))
    queries.forward(model, queries.pick(some, torch.tensor([0, 1])), caches)
    swapped = Texts(some.tokens[[1, 0]], some.token_mask[[1, 0]], some.labels[:2])
    straight = Texts(some.tokens[[0, 1]], some.token_mask[[0, 1]], some.labels[:2])
    asked = {queries.EXACT: straight, "2 %": swapped}
    answers = queries.ask(model, caches, asked, dict.fromkeys(asked, 0.0))
    assert answers["2 %"].hit_rate.tolist() == [1, 1]
    assert answers["2 %"].own.tolist() == [0, 0]


# ---- the language model


def test_training_with_a_cache_that_finds_nothing_is_training_without() -> None:
    """Each step moves every gate input, if only a little: none is equal to an earlier one."""
    scale = replace(SMALL, steps=TINY.steps)
    corpus = made_up_text()
    plain = text.train(TINY, corpus, scale)
    cached = text.train(TINY, corpus, scale, 1.0)
    assert np.isnan(plain.hit_rate).all()
    assert cached.hit_rate.tolist() == [0] * TINY.steps
    np.testing.assert_array_equal(cached.losses, plain.losses)
    assert cached.held_out == plain.held_out
    assert cached.model.moes[0].cache is None


def test_training_with_a_cache_that_finds_much() -> None:
    scale = replace(SMALL, steps=TINY.steps)
    cached = text.train(TINY, made_up_text(), scale, 0.9)
    assert cached.hit_rate[0] == 0
    assert cached.hit_rate[-1] > 0.3
    assert np.isnan(cached.alive[0])  # there was no entry before the first step
    assert ((cached.alive[1:] > 0) & (cached.alive[1:] <= 1)).all()


def test_text_is_followed() -> None:
    scale = replace(SMALL, steps=TINY.steps, sizes=(16, 600), warm=1, measured=2, batch=2)
    corpus = made_up_text()
    model = text.train(TINY, corpus, scale).model
    batches = text.batches_of(corpus, TINY.context, 3, scale.batch)
    assert [tuple(batch.shape) for batch in batches] == [(2, TINY.context + 1)] * 3
    found = text.follow_all(model, batches, scale)
    assert list(found) == [16, 600]
    for by_similarity in found.values():
        assert list(by_similarity) == list(SIMILARITIES)
        for one in by_similarity.values():
            assert one.hit_rate.shape == (2,)
            assert math.isfinite(one.change)
    usual = {size: one[USUAL] for size, one in found.items()}
    assert (usual[16].entries <= 16).all()
    assert (usual[600].hit_rate >= usual[16].hit_rate).all()
    assert usual[600].nbytes > usual[16].nbytes
    # The same text again, of which everything is remembered.
    plain = [text.loss(model, batches[0])[0]] * 2
    again = text.follow(model, [batches[0]] * 3, 1, plain, RoutingCache(600, 0.9999))
    assert again.hit_rate[0] == 1
    assert again.complete[0] == 2
    assert again.change == pytest.approx(0, abs=1e-3)


# ---- one domain after another


def test_no_window_of_the_stream_comes_twice() -> None:
    scale = replace(SMALL, batch=8, segment=5)
    windows = stream.stream_of(made_up_text(), 64, scale)
    assert windows.domains == ["low", "high", "low"]
    assert [len(steps) for steps in windows.steps] == [5] * 3
    rows = torch.cat([window for steps in windows.steps for window in steps])
    assert rows.shape == (3 * 5 * 2, 65)
    assert len(rows.unique(dim=0)) == len(rows)


def test_changes_of_domain() -> None:
    rates = np.array([0.0, 0.5, 0.7, 0.8, 0.2, 0.5, 0.59, 0.6, 0.9, 0.9, 0.9, 0.9])
    assert stream.changes_of(rates, 4) == [(0.8, 0.2, 0.6, 2), (0.6, 0.9, 0.9, 0)]


# ---- time


def planted(costs: timing.Costs, rows: int, size: int, without: float = 1.0) -> timing.Case:
    """A case that takes what the costs say."""
    router, lookup = costs.router(rows, size), costs.lookup(rows, size)
    times = {"router": router, "lookup": lookup, "update": 0.25, "without": without}
    with_cache = without - router + lookup
    return timing.Case(timing.DEEP, "", rows, size, 1.0, 64.0, size, **times, with_cache=with_cache)


def test_the_formula_is_where_both_take_the_same_time() -> None:
    costs = timing.Costs(1e-4, 1e-11, 2e-4, 7e-7, 1e-9)
    for rows in (512, 4096):
        size = costs.break_even(rows)
        assert costs.router(rows, size) == pytest.approx(costs.lookup(rows, size))
        assert costs.router(rows, 2 * size) > costs.lookup(rows, 2 * size)
    assert (
        costs.break_even(64) == math.inf
    )  # 64 products of a parameter take less than comparing it
    assert costs.router(64, 1e9) < costs.lookup(64, 1e9)


def test_costs_are_found_again() -> None:
    costs = timing.Costs(1e-4, 1e-11, 2e-4, 7e-7, 1e-9)
    cases = [
        planted(costs, rows, size) for rows in (64, 512, 4096) for size in (9_000, 200_000, 10**6)
    ]
    assert timing.costs_of(cases) == pytest.approx(costs)
    assert costs.ratio(cases[0]) == pytest.approx(cases[0].ratio)
    assert cases[0].updated_ratio == pytest.approx(cases[0].ratio + 0.25)
    groups = timing.by_gate_inputs(cases)
    assert [len(some) for some in groups.values()] == [3] * 3
    found = {rows: timing.measured_break_even(some) for rows, some in groups.items()}
    assert math.isnan(found[64])
    assert 9_000 < found[4096] < 200_000


def test_a_layer_is_timed() -> None:
    layer = timing.make_layer(Router(32, 4), 32, 4)
    case = timing.measure("group", "name", layer, torch.randn(24, 32), SMALL)
    assert (case.gate_inputs, case.multiplications, case.parameters) == (24, 128, 128)
    assert 1 <= case.compared < 4
    assert case.lookup_multiplications == 2 * 16 * 32 + 4 * 32 * case.compared
    assert min(case.router, case.lookup, case.update, case.without, case.with_cache) > 0
    assert layer.cache is None
    router = SequenceRouter(Router(32, 4), pooling="attention")
    pooled = timing.measure("", "", timing.make_layer(router, 32, 4), torch.randn(3, 8, 32), SMALL)
    assert (pooled.gate_inputs, pooled.multiplications, pooled.parameters) == (3, 128, 160)


# ---- what is shown


def test_cells() -> None:
    assert report.cell([0.5]) == "50.0"
    assert report.cell([0.5, 0.5]) == "50.0 ±0.0"
    assert report.cell([0.25, 0.75, math.nan], 0) == "50 ±318"  # 12.706 / sqrt(2) * 0.354
    assert report.cell([math.nan] * 2) == "n/a"
    assert report.cell([0.0012], 1, 1000, "+") == "+1.2"
    assert report.rounded(math.inf) == report.over(math.nan, 3) == "none"
    assert (report.rounded(12345.0), report.over(30.0, 4)) == ("12,300", "7.5")


def found_with(rates: dict[str, float]) -> queries.Found:
    """Hit rates at the usual similarity, by query."""
    own, none = np.array([0.25]), np.array([math.nan])
    answers = {
        name: queries.Answer(np.array([rate]), own, none, 0.0) for name, rate in rates.items()
    }
    return queries.Found(4, 0.5, 1.0, {}, {USUAL: answers})


def test_where_unseen_texts_hit_as_often() -> None:
    rates = {"exact": 1.0, "2 %": 0.9, "5 %": 0.7, "10 %": 0.5, "20 %": 0.1, "unseen": 0.5}
    sentence = report.unseen_sentence("mean", [found_with(rates)])
    assert sentence.startswith(
        "mean: at 0.98 50.0 % of the unseen texts hit, no fewer than of those with 10 % of their "
        "bytes new; the entry of the unchanged text is found by 25.0 % of the hits with 2 %, "
    )
    fewer = report.unseen_sentence("mean", [found_with({**rates, "unseen": 0.0})])
    assert " 0.0 % of the unseen texts hit, fewer than of the texts of every other kind; " in fewer


def test_numbers_are_ready_for_json() -> None:
    content = {0.9: (np.array([1.0, math.nan]), 2), "a": [math.inf, 1 / 3, None, "b"]}
    assert report.ready(content) == {"0.9": [[1.0, None], 2], "a": [None, 0.333333, None, "b"]}


def test_the_whole_study_is_larger_than_the_small_one() -> None:
    for name in ("steps", "batch", "texts", "warm", "segment", "rounds"):
        assert getattr(FULL, name) > getattr(SMALL, name)
    assert FULL.sizes == (512, 4096, 32768)


def test_one_domain_is_refused(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, program.main, "--data", data[0], "--out", str(tmp_path)).err
    assert error.startswith(
        "python -m studies.routing_cache: error: --data must name at least two paths, got 1"
    )
