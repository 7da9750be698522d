"""Assistance: when a backup joins an expert, for whose tokens, and what that changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.testing import assert_close

import reference
from assisted_layers import F64, INNER, RING, SLOTS, E, H, K, T, make
from plain_moe import gradients
from torchmoe.nn import Assistance, Balance, Capacity, Gate, MoE, Router

# --- when ---------------------------------------------------------------------------------------


def test_state_machine_worked_by_hand() -> None:
    """Above 2/4 for three updates in a row it begins, below 1.5/4 it ends."""
    assistance = Assistance((1, 2, 3, 0), threshold=2.0, lower_threshold=1.5, patience=3)
    for usage, above, assisted in (
        (0.5, 0, False),  # as much is not above
        (0.6, 1, False),
        (0.6, 2, False),
        (0.5, 0, False),  # three in a row
        (0.6, 1, False),
        (0.6, 2, False),
        (0.51, 3, True),
        (0.6, 4, True),
        (0.5, 0, True),  # between the thresholds
        (0.4, 0, True),
        (0.375, 0, True),  # as little is not below
        (0.37, 0, False),
        (0.5, 0, False),  # between the thresholds, on the way up
        (0.6, 1, False),
        (0.6, 2, False),
        (0.6, 3, True),
        (0.0, 0, False),
    ):
        assistance.update(torch.tensor([0.1, usage, 0.1, 0.1], dtype=F64), SLOTS)
        assert assistance.updates_above.tolist() == [0, above, 0, 0], usage
        assert assistance.assisted.tolist() == [False, assisted, False, False], usage


def test_every_expert_on_its_own() -> None:
    assistance = Assistance((1, 0, 3, 2), threshold=1.0, lower_threshold=0.5, patience=2)
    seen = []
    for usage in ([0.4, 0.4, 0.1, 0.1], [0.4, 0.1, 0.4, 0.1], [0.2, 0.1, 0.6, 0.1]):
        assistance.update(torch.tensor(usage), SLOTS)
        seen.append(assistance.assisted.nonzero().flatten().tolist())
    assert seen == [[], [0], [0, 2]]
    assert assistance.updates_above.tolist() == [0, 0, 2, 0]


def test_a_patience_of_one_begins_at_once() -> None:
    assistance = Assistance((1, 0), threshold=1.5, lower_threshold=1.5, patience=1)
    for usage, assisted in ((0.8, True), (0.75, True), (0.74, False), (0.76, True)):
        assistance.update(torch.tensor([usage, 1 - usage], dtype=F64), SLOTS)
        assert assistance.assisted.tolist() == [assisted, False]


def test_no_load_that_is_not_a_number_begins() -> None:
    assistance = Assistance((1, 0), patience=1)
    assistance.update(torch.tensor([torch.nan, 0.75]), SLOTS)
    assert not assistance.assisted.any()


def test_defaults() -> None:
    assistance = Assistance((1, 2, 0))
    assert (assistance.threshold, assistance.lower_threshold) == (2.0, 1.5)
    assert assistance.patience == 100
    expected = "Assistance(backup=(1, 2, 0), threshold=2.0, lower_threshold=1.5, patience=100)"
    assert repr(assistance) == expected


def test_changes_in_update_only() -> None:
    moe = make(assistance={"threshold": 1.0, "lower_threshold": 0.1, "patience": 2})
    moe.router.usage_decay = 0.0
    x = torch.randn(T, H, dtype=F64)
    for mode in (True, False):
        moe.train(mode)
        before = copy.deepcopy(moe.state_dict())
        output = moe(x)
        (output.hidden_states.sum() + output.aux_loss).backward()
        assert_close(moe.state_dict(), before, rtol=0, atol=0)
    routing = output.routing
    above = routing.tokens_per_expert > K * T / E
    assert above.any()
    moe.update(routing)
    assert torch.equal(moe.assistance.updates_above, above.float())
    assert not moe.assistance.assisted.any()
    moe.update(routing)
    assert torch.equal(moe.assistance.assisted, above.float())


def test_the_usage_is_the_one_after_its_own_update() -> None:
    moe = make(assistance={"threshold": 1.0, "lower_threshold": 0.01, "patience": 1})
    routing = moe(torch.randn(T, H, dtype=F64)).routing
    moe.update(routing)  # usage was 1 / E, so it is above now where the load is
    assert torch.equal(moe.assistance.assisted, routing.tokens_per_expert > K * T / E)


def test_micro_batches_are_one_update() -> None:
    moe = make(assistance={"threshold": 0.5, "lower_threshold": 0.1})
    moe.update([moe(torch.randn(T, H, dtype=F64)).routing for _ in range(3)])
    assert moe.assistance.updates_above.max() == 1


def test_a_layer_under_sustained_load_gets_help_and_loses_it() -> None:
    moe = make(
        assistance={"patience": 5}, router=Router(H, E, bias=True, track_usage=True).double()
    )
    moe.router.usage_decay = 0.5
    x = torch.randn(T, H, dtype=F64)
    collapsed = torch.tensor([9.0, 0, 0, 0, 0], dtype=F64)
    assisted, helped = [], []
    for step in range(12):
        with torch.no_grad():
            # Usage of expert 0 goes to 1/2 and is above 2/5 from the second update on; then it
            # halves, to below 1.5/5.
            moe.router.bias.copy_(collapsed if step < 8 else -collapsed)
        routing = moe(x).routing
        helped.append(bool((routing.selected[:, K] == 1).any()))
        moe.update(routing)
        assisted.append(moe.assistance.assisted.nonzero().flatten().tolist())
    assert assisted == [[]] * 5 + [[0]] * 3 + [[]] * 4
    # From the step after.
    assert helped == [False] * 6 + [True] * 2 + [False] * 4


# --- whose backup -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assisted", "expected"),
    [
        ([], [-1, -1, -1, -1, -1, -1, -1, -1]),
        # Expert 0's backup is 1.
        ([0], [1, 1, -1, -1, -1, 1, 1, -1]),
        # The better choice decides: in [1, 0] it is 2 for 1; in [0, 1] it would be 1, which the
        # token has.
        ([0, 1], [1, 1, -1, 2, -1, 1, 1, 2]),
        ([2], [3, 3, -1, -1, -1, -1, -1, -1]),
        ([0, 2], [1, 3, -1, -1, -1, 1, 1, -1]),
        ([3, 4], [-1, -1, -1, -1, -1, -1, -1, -1]),
    ],
)
def test_worked_by_hand(assisted: list[int], expected: list[int]) -> None:
    selected = torch.tensor([[0, 2], [2, 0], [0, 1], [1, 0], [-1, -1], [0, -1], [-1, 0], [1, 7]])
    assistance = Assistance(RING)
    assistance.assisted[assisted] = True
    slots = assistance(selected)
    assert slots.dtype == torch.int64
    assert torch.equal(slots[:, :2], selected)
    assert slots[:, 2].tolist() == expected


@pytest.mark.parametrize("top_k", [1, 2, 4, 5])
def test_always_one_more_column(top_k: int) -> None:
    for assisted in ([], [0, 3], range(E)):
        assistance = Assistance(RING)
        assistance.assisted[list(assisted)] = True
        for num_tokens in (0, 1, 30):
            selected = torch.rand(num_tokens, E).argsort(1)[:, :top_k]
            slots = assistance(selected)
            assert slots.shape == (num_tokens, top_k + 1)
            for row in slots.tolist():
                helped = [e for e in row[:-1] if assistance.assisted[e]]
                helper = RING[helped[0]] if helped else -1
                assert row[-1] == (-1 if helper in row[:-1] else helper)


# --- what it changes in the layer ---------------------------------------------------------------


def test_without_anybody_assisted_the_layer_is_the_same() -> None:
    x, mask = torch.randn(T, H, dtype=F64), torch.rand(T) > 0.2
    for capacity in (None, Capacity(0.8), Capacity(0.8, overflow="next_best")):
        plain = MoE(
            H, INNER, E, K, capacity=capacity, balance=Balance(z_loss_weight=0.1), dtype=F64
        )
        moe = make(capacity=capacity, balance=Balance(z_loss_weight=0.1))
        moe.load_state_dict(plain.state_dict(), strict=False)
        seen = []
        for layer in (plain, moe):
            output = layer(x, token_mask=mask)
            (output.hidden_states.square().sum() + output.aux_loss).backward()
            seen.append((output, gradients(layer)))
        (a, grads), (b, assisted_grads) = seen
        assert torch.equal(b.routing.selected[:, :K], a.routing.selected)
        assert torch.equal(b.routing.indices[:, :K], a.routing.indices)
        assert (b.routing.indices[:, K] == -1).all()
        assert (b.routing.weights[:, K] == 0).all()
        assert_close(b.hidden_states, a.hidden_states)
        assert_close(b.routing.losses, a.routing.losses)
        assert_close(assisted_grads, grads)


@pytest.mark.parametrize("normalize", ["none", "topk"])
@pytest.mark.parametrize("estimator", ["exact", "straight_through"])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_the_extra_slot_is_weighed_like_any_other(
    score_function: str, normalize: str, estimator: str
) -> None:
    moe = make([0, 3], gate=Gate(score_function, normalize, estimator), balance=Balance(weight=0.0))
    x = torch.randn(T, H, dtype=F64, requires_grad=True)
    output = moe(x)
    output.hidden_states.square().sum().backward()
    got = gradients(moe) | {"x": x.grad.clone()}
    routing = output.routing
    joined = routing.selected[:, K] >= 0
    assert 0 < joined.sum() < T
    assert routing.indices is routing.selected
    assert (routing.weights[joined] > 0).all()
    if normalize == "topk":
        assert_close(routing.weights.sum(1), torch.ones(T, dtype=F64))

    moe.zero_grad()
    x.grad = None
    chosen = linear(x, moe.router.weight).topk(K).indices
    extra = []
    for row in chosen.tolist():
        helped = [e for e in row if e in (0, 3)]
        helper = RING[helped[0]] if helped else -1
        extra.append(-1 if helper in row else helper)
    indices = torch.cat([chosen, torch.tensor(extra).unsqueeze(1)], 1)
    assert torch.equal(routing.selected, indices)
    weights = reference.gate_weights(
        linear(x, moe.router.weight),
        indices,
        score_function=score_function,
        normalize=normalize,
        estimator=estimator,
    )
    y = reference.expert_mlp(
        x,
        indices,
        weights,
        moe.experts.gate_up_proj,
        None,
        moe.experts.down_proj,
        None,
        "swiglu",
    )
    y.square().sum().backward()
    assert_close(routing.weights, weights)
    assert_close(output.hidden_states, y)
    assert_close(got, gradients(moe) | {"x": x.grad})


def test_counts_are_the_routers_own_choices() -> None:
    moe = make(range(E))
    x = torch.randn(T, H, dtype=F64)
    routing = moe(x).routing
    own = routing.selected[:, :K].flatten().bincount(minlength=E)
    joined = int((routing.selected[:, K] >= 0).sum())
    assert joined > 0
    assert torch.equal(routing.tokens_per_expert, own)
    served = routing.indices[routing.indices >= 0].bincount(minlength=E)
    assert torch.equal(routing.kept_per_expert, served)
    assert routing.kept_per_expert.sum() == K * T + joined
    moe.router.usage_decay = 0.0
    moe.update(routing)
    assert_close(moe.router.usage, own.double() / (K * T))
    # The fractions of the balancing loss too.
    share = routing.logits.softmax(1).mean(0)
    expected = E * (own / (K * T) * share).sum()
    assert_close(routing.losses["load_balancing_loss"], expected)


def test_masked_tokens_get_no_help() -> None:
    moe = make(range(E))
    x, mask = torch.randn(T, H, dtype=F64), torch.rand(T) > 0.4
    x[~mask] = torch.nan
    output = moe(x, token_mask=mask)
    routing = output.routing
    assert (routing.selected[~mask] == -1).all()
    assert (routing.selected[mask][:, K] >= 0).any()
    assert (output.hidden_states[~mask] == 0).all()
    alone = moe(x[mask])
    assert_close(output.hidden_states[mask], alone.hidden_states)
    assert torch.equal(routing.selected[mask], alone.routing.selected)


# --- with capacity, worked by hand --------------------------------------------------------------


def by_logits(top_k: int, capacity: Capacity, **options: Any) -> MoE:
    """Three experts; a token is its own logits. Expert 0 is assisted by 1, 1 by 2, 2 by 0."""
    assistance = Assistance((1, 2, 0))
    assistance.assisted[0] = True
    router = Router(3, 3, track_usage=True, dtype=F64)
    nn.init.eye_(router.weight)
    return MoE(
        3,
        4,
        3,
        top_k,
        router=router,
        assistance=assistance,
        capacity=capacity,
        dtype=F64,
        **options,
    )


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [
        # Room for two: ceil(4 / 3), from the top_k choices and not from the extra slot.
        (Capacity(1), [[0, 1], [0, 1], [-1, -1], [-1, -1]]),
        (Capacity(1, order="token"), [[0, 1], [0, 1], [-1, -1], [-1, -1]]),
        # The extra slot of tokens 2 and 3 still waits for 1, so that their first goes to 2, and
        # finds nothing then.
        (Capacity(1, overflow="next_best"), [[0, 1], [0, 1], [2, -1], [2, -1]]),
        # The backup of 0 is 2 here.
        (Capacity(1, overflow="backup", backup=(2, 0, 1)), [[0, 1], [0, 1], [2, -1], [2, -1]]),
        # Room for three.
        (Capacity(2), [[0, 1], [0, 1], [0, 1], [-1, -1]]),
        (Capacity(2, overflow="next_best"), [[0, 1], [0, 1], [0, 1], [2, -1]]),
        (Capacity(9), [[0, 1]] * 4),
    ],
)
def test_capacity_worked_by_hand(capacity: Capacity, expected: list[list[int]]) -> None:
    moe = by_logits(1, capacity)
    x = torch.tensor([[2.0, 1.0, 0.0]] * 4, dtype=F64)
    routing = moe(x).routing
    assert routing.selected.tolist() == [[0, 1]] * 4
    assert routing.indices.tolist() == expected
    assert routing.tokens_per_expert.tolist() == [4, 0, 0]
    kept = [sum(row.count(e) for row in expected) for e in range(3)]
    assert routing.kept_per_expert.tolist() == kept


def test_the_extra_slot_is_served_as_the_last_choice() -> None:
    # Token 0 is helped by 1, which token 1 chose itself; there is room for one.
    x = torch.tensor([[2.0, -2.0, 0.0], [-2.0, 2.0, 0.0]], dtype=F64)
    routing = by_logits(1, Capacity(1)).forward(x).routing
    assert routing.selected.tolist() == [[0, 1], [1, -1]]
    assert routing.indices.tolist() == [[0, -1], [1, -1]]
    routing = by_logits(1, Capacity(1, order="token")).forward(x).routing
    assert routing.indices.tolist() == [[0, 1], [-1, -1]]
    routing = by_logits(1, Capacity(1, overflow="next_best")).forward(x).routing
    assert routing.indices.tolist() == [[0, 2], [1, -1]]


def test_a_rerouted_extra_slot_gets_its_new_experts_weight() -> None:
    x = torch.tensor([[2.0, -2.0, 0.0], [-2.0, 2.0, 0.0]], dtype=F64)
    moe = by_logits(1, Capacity(1, overflow="next_best"), gate=Gate(normalize="none"))
    weights = moe(x).routing.weights
    p = x.softmax(1)
    assert_close(weights, torch.stack([p[0, [0, 2]], torch.stack([p[1, 1], p.new_zeros(())])]))
