"""Experts that pick their tokens: who is picked, how many, the weights, and what goes with it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from plain_moe import gradients
from torchmoe.nn import (
    Assistance,
    Balance,
    Capacity,
    CosineRouter,
    ExpertChoiceRouter,
    Gate,
    MoE,
    Router,
    SequenceRouter,
)
from torchmoe.testing import gradcheck

H, INNER, E, K, B, S = 6, 7, 5, 2, 3, 8
F64 = torch.float64
AMONG = ("batch", "sequence")
every_among = pytest.mark.parametrize("among", AMONG)


class Table(nn.Module):
    """Logits that are given."""

    num_experts = E

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def make(among: str = "batch", top_k: int = K, most: int | None = None, **options: Any) -> MoE:
    inner = options.pop("inner", None) or Router(H, E, dtype=F64)
    score_function = options.get("gate", Gate()).score_function
    router = ExpertChoiceRouter(
        inner, top_k, among=among, most_per_token=most, score_function=score_function
    )
    return MoE(H, INNER, E, top_k, router=router, dtype=F64, **options)


def plain_choice(
    logits: Tensor, among: str, top_k: int, mask: Tensor | None, most: int
) -> list[list[int]]:
    """The experts of each of the tokens [B, S, E], best first and filled up with -1."""
    batch, length, num_experts = logits.shape
    # As the router sees them: equal scores are equal after rounding.
    scores = logits.softmax(dim=-1).tolist()
    tokens = [(b, s) for b in range(batch) for s in range(length)]
    groups = (
        [tokens] if among == "batch" else [[t for t in tokens if t[0] == b] for b in range(batch)]
    )
    picked: dict[tuple[int, int], list[int]] = {token: [] for token in tokens}
    for group in groups:
        counted = [t for t in group if mask is None or mask[t]]
        picks = math.ceil(top_k * len(counted) / num_experts)
        for expert in range(num_experts):
            order = sorted(counted, key=lambda t: -scores[t[0]][t[1]][expert])
            for token in order[:picks]:
                picked[token].append(expert)
    rows = []
    for b, s in tokens:
        best = sorted(picked[b, s], key=lambda e: (-scores[b][s][e], e))[:most]
        rows.append(best + [-1] * (most - len(best)))
    return rows


@every_among
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("top_k", "most"), [(1, 5), (2, 5), (2, 2), (3, 1), (5, 5), (5, 3)])
def test_picks_as_a_loop_does(among: str, masked: bool, ties: bool, top_k: int, most: int) -> None:
    # With ties: few different values, in few different rows, so that scores are equal too.
    logits = torch.randint(-1, 2, (B, S, E)).double() if ties else torch.randn(B, S, E, dtype=F64)
    mask = torch.rand(B, S) > 0.4 if masked else None
    moe = make(among, top_k, most, inner=Table(logits.view(B * S, E)))
    routing = moe(torch.randn(B, S, H, dtype=F64), token_mask=mask).routing
    assert routing.selected.tolist() == plain_choice(logits, among, top_k, mask, most)
    assert routing.selected.dtype == torch.int64
    assert torch.equal(routing.logits, logits.view(B * S, E))


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 4, 5, 6, 23])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_every_expert_picks_as_many(num_tokens: int, top_k: int) -> None:
    moe = make(top_k=top_k)
    x = torch.randn(num_tokens, H, dtype=F64)
    output = moe(x)
    picks = math.ceil(top_k * num_tokens / E)
    assert output.routing.tokens_per_expert.tolist() == [picks] * E
    assert output.routing.indices.shape == (num_tokens, E)
    assert output.hidden_states.shape == x.shape
    assert output.hidden_states.isfinite().all()
    assert output.aux_loss.isfinite()
    if top_k == E and num_tokens:
        assert (output.routing.selected.sort(dim=1).values == torch.arange(E)).all()


def test_every_expert_picks_as_many_from_each_sequence() -> None:
    mask = torch.arange(S) < torch.tensor([8, 3, 0]).unsqueeze(1)
    routing = make("sequence")(torch.randn(B, S, H, dtype=F64), token_mask=mask).routing
    ids = routing.selected.view(B, S, E)
    for b, picks in enumerate((4, 2, 0)):  # ceil(2 * 8 / 5), ceil(2 * 3 / 5), 0
        assert [int((ids[b] == e).sum()) for e in range(E)] == [picks] * E
    assert (ids[~mask] == -1).all()
    ids = make("batch")(torch.randn(B, S, H, dtype=F64), token_mask=mask).routing.selected
    assert [int((ids == e).sum()) for e in range(E)] == [5] * E  # ceil(2 * 11 / 5)
    assert (ids[~mask.flatten()] == -1).all()


@every_among
@pytest.mark.parametrize(
    "leading", [(), (1,), (0,), (S,), (B, 1), (B, 0), (0, S), (2, B, S), (2, 0, S)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_sizes(among: str, leading: tuple[int, ...], masked: bool) -> None:
    moe = make(among)
    x = torch.randn(*leading, H, dtype=F64)
    mask = torch.ones(leading, dtype=torch.bool) if masked else None
    if among == "sequence" and not leading:
        message = (
            r'ExpertChoiceRouter: x must be \[..., length, hidden_size\] with among "sequence", '
            r"got shape \[6\]"
        )
        with pytest.raises(RuntimeError, match=message):
            moe(x, token_mask=mask)
        return
    output = moe(x, token_mask=mask)
    assert output.hidden_states.shape == x.shape
    logits = output.routing.logits.detach()
    shape = (-1, leading[-1]) if leading and logits.numel() else (logits.shape[0], 1)
    shape = shape if among == "sequence" else (1, logits.shape[0])
    expected = plain_choice(logits.view(*shape, E), among, K, None, E)
    assert output.routing.selected.tolist() == expected
    output.hidden_states.square().sum().backward()
    assert all(gradient.isfinite().all() for gradient in gradients(moe).values())


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_weights_are_the_scores(score_function: str) -> None:
    moe = make(gate=Gate(score_function))
    assert moe.estimator.normalize == "none"
    routing = moe(torch.randn(B, S, H, dtype=F64)).routing
    logits = routing.logits
    scores = logits.softmax(-1) if score_function == "softmax" else logits.sigmoid()
    chosen = routing.selected >= 0
    assert_close(routing.weights, scores.gather(1, routing.selected.clamp(min=0)) * chosen)
    # Best first, those without an expert last.
    ranked = scores.gather(1, routing.selected.clamp(min=0)).masked_fill(~chosen, -1)
    assert (ranked.diff(dim=1) <= 0).all()


def test_experts_pick_by_the_score_function() -> None:
    # By softmax expert 0 prefers the second token, since the first one prefers expert 1 too.
    logits = torch.tensor([[5.0, 5.0], [1.0, -3.0]], dtype=F64)
    for score_function, best in (("softmax", [1, 0]), ("sigmoid", [0, 0])):
        table = Table(logits)
        table.num_experts = 2
        router = ExpertChoiceRouter(table, 1, score_function=score_function)
        ids = router(torch.zeros(2, H, dtype=F64)).indices
        assert [int((ids == e).any(dim=1).nonzero()) for e in (0, 1)] == best


def test_the_gate_may_ask_for_another_normalisation() -> None:
    moe = make(gate=Gate(normalize="topk"))
    assert moe.estimator.normalize == "topk"
    routing = moe(torch.randn(B, S, H, dtype=F64)).routing
    totals = (routing.selected >= 0).any(dim=1).double()
    assert_close(routing.weights.sum(1), totals)


def test_output_is_the_sum_over_those_who_picked_it() -> None:
    moe = make(top_k=1, shared_experts=nn.Linear(H, H, dtype=F64))
    x = torch.randn(B, S, H, dtype=F64)
    output = moe(x)
    probs = output.routing.logits.softmax(-1)
    rows = x.view(B * S, 1, H)
    expected = moe.shared_experts(rows).squeeze(1)
    everyone = torch.arange(E).expand(B * S, E)
    for e in range(E):
        picked = (output.routing.selected == e).any(dim=1)
        weights = (probs * picked.unsqueeze(1)) * (torch.arange(E) == e)
        expected = expected + moe.experts(rows.squeeze(1), everyone, weights)
    assert_close(output.hidden_states.view(B * S, H), expected)
    lost = (output.routing.selected == -1).all(dim=1)
    assert lost.any()
    assert_close(output.hidden_states.view(B * S, H)[lost], moe.shared_experts(x.view(-1, H)[lost]))


@pytest.mark.parametrize("changed", ["neighbour", "later"])
@every_among
def test_who_sees_whom(among: str, changed: str) -> None:
    moe = make(among)
    x = torch.randn(B, S, H, dtype=F64)
    other = x.clone()
    where = (0,) if changed == "neighbour" else (slice(None), slice(4, None))
    kept = (slice(1, None),) if changed == "neighbour" else (slice(None), slice(4))
    other[where] = 3 * torch.randn_like(other[where])
    one, two = (moe(each).hidden_states[kept] for each in (x, other))
    assert torch.equal(one, two) == (among == "sequence" and changed == "neighbour")
    assert moe.router.looks_ahead == (
        f"lets experts pick from all tokens of a {among}, and whether an early one is picked "
        "depends on later ones"
    )


def test_the_balancing_loss_is_1() -> None:
    # Equal counts are fractions of 1 / E, and the mean scores add up to 1.
    routing = make()(torch.randn(B, S, H, dtype=F64)).routing
    expected = torch.tensor(1.0, dtype=F64)
    assert_close(routing.losses["load_balancing_loss"], expected, rtol=0, atol=1e-14)
    moe = make("sequence", balance=Balance(fraction_from="sequence"))
    routing = moe(torch.randn(B, S, H, dtype=F64)).routing
    assert_close(routing.losses["load_balancing_loss"], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("width", [H, 4])
def test_router_input_replaces_x(width: int) -> None:
    moe = make("sequence", inner=Router(width, E, dtype=F64))
    other = torch.randn(B, S, width, dtype=F64)
    mask = torch.rand(B, S) > 0.3
    logits = moe.router.router(other.view(B * S, width)).view(B, S, E).detach()
    spoiled = other.masked_fill(~mask.unsqueeze(-1), torch.nan)
    routing = moe(torch.randn(B, S, H, dtype=F64), router_input=spoiled, token_mask=mask).routing
    assert routing.selected.tolist() == plain_choice(logits, "sequence", K, mask, E)


@pytest.mark.parametrize("inner", [CosineRouter(H, E, dtype=F64), nn.Linear(H, E, dtype=F64)])
def test_wraps_other_routers(inner: nn.Module) -> None:
    moe = make(inner=inner)
    x = torch.randn(B, S, H, dtype=F64)
    output = moe(x)
    assert torch.equal(output.routing.logits, inner(x.view(B * S, H)))
    moe.update(output.routing)
    before = moe.router.router.state_dict()[
        "weight" if isinstance(inner, nn.Linear) else "embeddings"
    ].clone()
    moe.reset_parameters()
    assert not any(torch.equal(before, p) for p in inner.parameters())


def test_usage_is_that_of_the_router_inside() -> None:
    inner = Router(H, E, track_usage=True, dtype=F64)
    moe = make(inner=inner, balance=Balance(fraction_from="history"), most=1)
    routing = moe(torch.randn(B, S, H, dtype=F64)).routing
    moe.update(routing)
    counts = routing.tokens_per_expert
    assert_close(inner.usage, 0.99 / E + 0.01 * counts.double() / counts.sum())
    assert moe.router.usage is inner.usage
    assert make().router.usage is None


@every_among
@pytest.mark.parametrize(
    "name", ["exact", "straight_through", "straight_through_dense", "default_vector"]
)
def test_estimators(name: str, among: str) -> None:
    moe = make(among, gate=Gate(estimator=name))
    x = torch.randn(B, S, H, dtype=F64, requires_grad=True)
    mask = torch.rand(B, S) > 0.3
    output = moe(x, token_mask=mask)
    (output.hidden_states.square().sum() + output.aux_loss).backward()
    assert moe.router.router.weight.grad.abs().max() > 0
    assert all(gradient.isfinite().all() for gradient in gradients(moe).values())
    assert (output.hidden_states[~mask] == 0).all()
    assert (x.grad[~mask] == 0).all()
    moe.update(output.routing)
    same = make(among)
    same.load_state_dict(moe.state_dict(), strict=False)
    assert torch.equal(same(x, token_mask=mask).routing.selected, output.routing.selected)


def test_derivatives() -> None:
    x = torch.randn(2, 3, 3, dtype=F64)
    mask = torch.tensor([[False, True, True], [True, True, False]])
    for among in AMONG:
        router = ExpertChoiceRouter(Router(3, 3, dtype=F64), K, among=among)
        assert gradcheck(router, (x, None, mask))
        moe = MoE(3, 2, 3, K, router=router, dtype=F64)
        assert gradcheck(moe, x, kwargs={"token_mask": mask})


@pytest.mark.parametrize("order", ["choice", "token"])
def test_a_capacity_limits_what_was_picked(order: str) -> None:
    moe = make(capacity=Capacity(0.5, order=order))
    routing = moe(torch.randn(B, S, H, dtype=F64)).routing
    assert routing.tokens_per_expert.tolist() == [10] * E  # ceil(2 * 24 / 5)
    assert routing.kept_per_expert.tolist() == [5] * E  # ceil(0.5 * 2 * 24 / 5)
    kept = routing.indices >= 0
    assert torch.equal(routing.indices[kept], routing.selected[kept])
    full = make(capacity=Capacity(1.0, order=order))(torch.randn(B, S, H, dtype=F64)).routing
    assert torch.equal(full.indices, full.selected)


def test_assistance_adds_a_slot() -> None:
    inner = Router(H, E, track_usage=True, dtype=F64)
    backup = [1, 2, 3, 4, 0]
    moe = make(inner=inner, assistance=Assistance(backup, patience=1))
    x = torch.randn(B, S, H, dtype=F64)
    before = moe(x).routing
    assert (before.selected[:, -1] == -1).all()
    inner.usage.copy_(torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1]))
    moe.update(before)
    routing = moe(x).routing
    assert routing.selected.shape == (B * S, E + 1)
    assert torch.equal(routing.selected[:, :E], before.selected[:, :E])
    for row in routing.selected.tolist():
        assert row[-1] == (1 if 0 in row[:E] and 1 not in row[:E] else -1)
    assert routing.tokens_per_expert.tolist() == [10] * E
    assert routing.kept_per_expert.tolist()[1] > 10
    again = moe(x, decision=routing.decision)
    assert torch.equal(again.hidden_states, moe(x).hidden_states)
    assert torch.equal(again.routing.tokens_per_expert, routing.tokens_per_expert)


def test_errors() -> None:
    inner = Router(H, E)
    for options, error, message in (
        ({"top_k": 0}, ValueError, r"ExpertChoiceRouter: top_k must be in \[1, 5\], got 0"),
        ({"top_k": 6}, ValueError, r"ExpertChoiceRouter: top_k must be in \[1, 5\], got 6"),
        ({"top_k": 1.5}, TypeError, r"ExpertChoiceRouter: top_k must be an int, got 1.5"),
        ({"most_per_token": 0}, ValueError, r"most_per_token must be in \[1, 5\], got 0"),
        ({"most_per_token": 6}, ValueError, r"most_per_token must be in \[1, 5\], got 6"),
        ({"among": "all"}, ValueError, r'among must be one of "batch", "sequence", got "all"'),
        (
            {"router": SequenceRouter(inner)},
            TypeError,
            r"ExpertChoiceRouter: router must be a module that scores each token alone, "
            r"such as Router or CosineRouter, got SequenceRouter",
        ),
        (
            {"router": nn.Tanh()},
            TypeError,
            r"ExpertChoiceRouter: router must have num_experts, got Tanh",
        ),
    ):
        with pytest.raises(error, match=message):
            ExpertChoiceRouter(**({"router": inner, "top_k": K} | options))


def test_extra_repr() -> None:
    text = "top_k=2, among='batch', most_per_token=5, score_function='softmax'"
    assert ExpertChoiceRouter(Router(H, E), K).extra_repr() == text
