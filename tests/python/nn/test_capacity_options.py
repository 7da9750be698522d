"""What Capacity's options do in the layer: who is served, who is rerouted, and what is causal."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import reference
from built_in import ESTIMATORS
from capacity_layers import RING, E, H, K, T, make
from limited import F64, by_logits
from plain_moe import gradients
from torchmoe.nn import Balance, Capacity, Gate

# --- who is served ------------------------------------------------------------------------------

# Four tokens want expert 0 first and expert 1 second, the more the later; one wants only expert 2.
WANTED = torch.tensor(
    [[2.0, 1.0, 0.0, 0.0], [3.0, 2.0, 0.0, 0.5], [4.0, 2.0, 0.0, 0.5], [5.0, 1.0, 0.0, 0.5]],
    dtype=F64,
)


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [
        # Room for ceil(2 * 4 / 4) = 2.
        (Capacity(1), [[0, 1], [0, 1], [-1, -1], [-1, -1]]),
        (Capacity(1, order="token"), [[0, 1], [0, 1], [-1, -1], [-1, -1]]),
        # First choices weigh 0.73, 0.73, 0.88 and 0.98, second ones the rest: the last two tokens
        # keep their first, the first two their second, by order since they weigh the same.
        (Capacity(1, priority="weight"), [[-1, 1], [-1, 1], [0, -1], [0, -1]]),
        # Tokens 0 and 1 have room for their two; then 3 beats 2 where it is the better.
        (Capacity(1, overflow="next_best"), [[0, 1], [0, 1], [3, 2], [3, 2]]),
        (Capacity(1, overflow="backup", backup=(2, 3, 0, 1)), [[0, 1], [0, 1], [2, 3], [2, 3]]),
        # The two with the largest weight first, then the others, now with 2 and 3 to go to: token
        # 0 ties between 2 and 3.
        (Capacity(1, priority="weight", overflow="next_best"), [[2, 1], [3, 1], [0, 3], [0, 2]]),
        (Capacity(0.5), [[0, 1], [-1, -1], [-1, -1], [-1, -1]]),
        # ceil(0.25 * 8 / 4) = 1; the minimum is 3.
        (Capacity(0.25, minimum=3), [[0, 1], [0, 1], [0, 1], [-1, -1]]),
        (Capacity(0.75, rounding="down"), [[0, 1], [-1, -1], [-1, -1], [-1, -1]]),  # 1.5
        (Capacity(0.75), [[0, 1], [0, 1], [-1, -1], [-1, -1]]),
    ],
)
def test_worked_by_hand(capacity: Capacity, expected: list[list[int]]) -> None:
    moe = by_logits(4, 2, capacity)
    routing = moe(WANTED).routing
    assert routing.selected.tolist() == [[0, 1]] * 4
    assert routing.indices.tolist() == expected
    assert routing.tokens_per_expert.tolist() == [4, 4, 0, 0]
    kept = [sum(row.count(e) for row in expected) for e in range(4)]
    assert routing.kept_per_expert.tolist() == kept


OPTIONS = [
    *[
        {"order": order, "overflow": overflow, "priority": priority}
        for order in ("choice", "token")
        for overflow in ("drop", "next_best", "backup")
        for priority in (None, "weight", "random")
    ]
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_equals_the_loop(options: dict[str, str | None]) -> None:
    backup = RING if options["overflow"] == "backup" else None
    moe = make(Capacity(0.9, backup=backup, **options))
    x, mask = torch.randn(T, H, dtype=F64), torch.rand(T) > 0.2
    torch.manual_seed(7)
    routing = moe(x, token_mask=mask).routing
    logits = routing.logits.detach()
    torch.manual_seed(7)
    priority = {
        None: None,
        "weight": logits.gather(1, routing.selected.clamp(min=0)).softmax(1),
        "random": torch.rand(T, K),
    }[options["priority"]]
    room = -(-9 * K * int(mask.sum()) // (10 * E))
    expected = reference.limit_capacity(
        routing.selected,
        torch.full((E,), room),
        order=options["order"],
        priority=priority,
        overflow=options["overflow"],
        scores=logits,
        backup=None if backup is None else torch.tensor(backup),
    )
    assert torch.equal(routing.indices, expected)
    assert not torch.equal(routing.indices, routing.selected)
    assert routing.kept_per_expert.max() <= room
    if options["overflow"] != "drop":
        moved = (routing.indices != routing.selected) & (routing.indices >= 0)
        assert moved.any()


@pytest.mark.parametrize("overflow", ["next_best", "backup"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_nobody_is_dropped_while_an_expert_it_does_not_hold_has_room(
    overflow: str, top_k: int
) -> None:
    backup = RING if overflow == "backup" else None
    for order in ("choice", "token"):
        for priority in (None, "weight", "random"):
            moe = make(
                Capacity(1, order=order, overflow=overflow, priority=priority, backup=backup),
                top_k,
                gate=Gate(normalize="none"),
            )
            routing = moe(torch.randn(40, H, dtype=F64)).routing
            room = 40 * top_k // E
            assert routing.kept_per_expert.max() <= room
            has_room = (routing.kept_per_expert < room).nonzero().flatten().tolist()
            for row in routing.indices.tolist():
                held = [e for e in row if e >= 0]
                assert len(set(held)) == len(held)
                assert len(held) == top_k or set(has_room) <= set(held)
            if top_k == 1:
                assert (routing.indices >= 0).all()


def test_rerouting_ranks_as_selection_does() -> None:
    """With a selection bias by score and bias, else by logits."""
    capacity = Capacity(1, overflow="next_best")
    x = torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 4, dtype=F64)
    assert by_logits(4, 1, capacity)(x).routing.indices.flatten().tolist() == [0, 1, 2, 3]
    biased = by_logits(4, 1, capacity, gate=Gate("sigmoid"))
    biased.selection_bias = torch.tensor([1.0, -0.5, 0.0, 0.5], dtype=F64)
    routing = biased(x).routing
    # Scores 1.95, 0.38, 0.73 and 1.
    assert routing.indices.flatten().tolist() == [0, 3, 2, 1]
    # The weights are without the bias.
    assert_close(routing.weights.flatten(), torch.tensor([3.0, 0, 1, 2], dtype=F64).sigmoid())


# --- by weight ----------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_least_weights_are_dropped(estimator: str) -> None:
    moe = make(Capacity(0.6, priority="weight"), gate=Gate(normalize="none", estimator=estimator))
    if estimator == "sparsemixer":
        moe.estimator.jitter = 5.0  # more than one expert competes
    routing = moe(torch.randn(60, H, dtype=F64)).routing
    for e in range(E):
        wants = routing.selected == e
        kept, lost = wants & (routing.indices == e), wants & (routing.indices == -1)
        assert kept.any()
        if lost.any():
            assert routing.weights[kept].min() >= routing.weights[lost].max()
    assert (routing.indices == -1).any()


def test_ranking_by_weight_is_no_part_of_the_graph() -> None:
    by_weight, plain = (
        make(Capacity(9, priority=p), balance=Balance(z_loss_weight=0.1)) for p in ("weight", None)
    )
    plain.load_state_dict(by_weight.state_dict())
    x = torch.randn(T, H, dtype=F64)
    seen = []
    for moe in (by_weight, plain):
        output = moe(x)
        (output.hidden_states.square().sum() + output.aux_loss).backward()
        seen.append(gradients(moe))
    assert_close(seen[0], seen[1], rtol=0, atol=0)


# --- at random ----------------------------------------------------------------------------------


def test_random_dropping_treats_all_alike() -> None:
    moe = by_logits(4, 1, Capacity(2, priority="random"), gate=Gate(normalize="none"))
    x = torch.tensor([[2.0, 1.0, 0.0, 0.0]] * 400, dtype=F64)  # room for 200
    early, rounds = 0, 10
    for _ in range(rounds):
        served = moe(x).routing.indices.flatten() == 0
        assert served.sum() == 200
        early += int(served[:200].sum())
    # Five standard deviations of a share of so many draws; by order it would be 1.
    assert abs(early / (200 * rounds) - 0.5) < 5 * 0.5 / (200 * rounds) ** 0.5


def test_random_draws_come_from_the_default_generator() -> None:
    moe = make(Capacity(0.6, priority="random"))
    x = torch.randn(T, H, dtype=F64)
    seen = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        seen.append(moe(x).routing.indices)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("order", ["choice", "token"])
def test_random_in_evaluation_is_the_order(order: str) -> None:
    moe = make(Capacity(0.6, priority="random", order=order)).eval()
    plain = make(Capacity(0.6, order=order)).eval()
    plain.load_state_dict(moe.state_dict())
    x = torch.randn(T, H, dtype=F64)
    state = torch.get_rng_state()
    routing = moe(x).routing
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(routing.indices, plain(x).routing.indices)
    assert not torch.equal(routing.indices, moe.train()(x).routing.indices)


def test_weight_priority_holds_in_evaluation_too() -> None:
    moe = make(Capacity(0.6, priority="weight"))
    x = torch.randn(T, H, dtype=F64)
    assert torch.equal(moe(x).routing.indices, moe.eval()(x).routing.indices)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("overflow", ["drop", "next_best"])
def test_checkpointing_replays_the_draws(overflow: str, use_reentrant: bool) -> None:
    moe = make(Capacity(0.6, priority="random", overflow=overflow))
    x = torch.randn(T, H, dtype=F64, requires_grad=True)
    calls = []
    moe.router.register_forward_hook(lambda *_: calls.append(1))
    seen = []
    for run in (moe, lambda x: checkpoint(moe, x, use_reentrant=use_reentrant)):
        moe.zero_grad()
        x.grad = None
        torch.manual_seed(11)
        y, aux_loss, routing = run(x)
        torch.manual_seed(99)  # what else would be drawn in between
        (y.square().sum() + aux_loss).backward()
        seen.append([y, aux_loss, routing.indices, x.grad.clone(), *gradients(moe).values()])
    assert len(calls) == 3
    assert_close(seen[0], seen[1], rtol=0, atol=0)
