"""Group-limited selection: a token's experts come from its best groups, and from nowhere else."""

from __future__ import annotations

import copy
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given
from torch import Tensor
from torch.testing import assert_close

import reference
from compiled_once import check_compiled_once
from plain_moe import gradients
from torchmoe.nn import Balance, Capacity, Exact, Gate, MoE, SparseMixer

H, INNER, E, K, T = 6, 7, 8, 3, 23
F64 = torch.float64


def bound(num_groups: int, top_groups: int, **options: Any) -> Exact:
    """An estimator as a layer would have it."""
    estimator = Exact()
    layer = {"top_k": K, "num_experts": E, "score_function": "sigmoid"} | options
    estimator.bind(
        hidden_size=H, normalize=None, num_groups=num_groups, top_groups=top_groups, **layer
    )
    return estimator


def make(num_groups: int = 4, top_groups: int = 2, **options: Any) -> MoE:
    gate = Gate(**({"score_function": "sigmoid"} | options.pop("gate", {})))
    gate = Gate(
        gate.score_function,
        gate.normalize,
        gate.estimator,
        num_groups=num_groups,
        top_groups=top_groups,
    )
    return MoE(H, INNER, E, K, gate=gate, **({"dtype": F64} | options))


def groups_of(scores: Tensor, logits: Tensor, num_groups: int, top_groups: int) -> list[int]:
    """One token's best groups: by the sum of their two best experts' scores.

    Of equal sums the larger sum of those two experts' exp(logit) is first, then the lower group.
    """
    sums, masses = [], []
    groups = zip(scores.chunk(num_groups), logits.chunk(num_groups), strict=True)
    for members, of_members in groups:
        best = reference.select_experts(
            members[None], min(2, len(members)), tie_break=of_members[None]
        )[0]
        sums.append(members[best].sum())
        masses.append(of_members[best].exp().sum())
    totals, tie_break = torch.stack(sums), torch.stack(masses)
    return reference.select_experts(totals[None], top_groups, tie_break=tie_break[None])[0].tolist()


def choose(scores: Tensor, logits: Tensor, num_groups: int, top_groups: int, top_k: int) -> Tensor:
    """The experts of those groups: score descending, then logit descending, then by id."""
    group_of = torch.arange(scores.shape[1]) // (scores.shape[1] // num_groups)
    offered = scores.detach().clone()
    for t, row in enumerate(scores.detach()):
        groups = groups_of(row, logits[t], num_groups, top_groups)
        offered[t, ~torch.isin(group_of, torch.tensor(groups))] = -torch.inf
    return reference.select_experts(offered, top_k, tie_break=logits)


def test_worked_by_hand() -> None:
    # Four groups of two; the scores are sigmoids, the biases make them whole numbers.
    wanted = torch.tensor(
        [
            # Sums 9, 8, 7, 6: groups 0 and 1, of which 9 and 5 and 3.
            [9.0, 0, 5, 3, 7, 0, 1, 5],
            # The best expert is alone in its group: sums 10, 11, 12, 3.
            [10.0, 0, 5, 6, 6, 6, 1, 2],
            # Ties between groups go to the lower, ties between experts too.
            [1.0, 1, 2, 0, 1, 1, 0, 2],
            # All negative: no group that is left out may win with 0.
            [-9.0, -8, -7, -6, -1, -2, -4, -3],
        ],
        dtype=F64,
    )
    expected = [[0, 2, 3], [3, 4, 5], [2, 0, 1], [4, 5, 7]]
    estimator = bound(4, 2)
    for row, ids in zip(wanted, expected, strict=True):
        # At logits of 0 every score is 1/2.
        got = estimator.select(torch.zeros(1, E, dtype=F64), selection_bias=row - 0.5)
        assert got.tolist() == [ids]
    # Without groups the second row's best comes first, and the last row's are the same.
    assert bound(1, 1).select(torch.zeros(1, E, dtype=F64), selection_bias=wanted[1]).tolist() == [
        [0, 3, 4]
    ]


def test_rank_is_minus_infinity_outside_the_groups() -> None:
    logits = torch.randn(T, E, dtype=F64)
    bias = torch.randn(E, dtype=F64)
    ranks = bound(4, 2).rank(logits, selection_bias=bias)
    for t, row in enumerate(logits.sigmoid() + bias):
        groups = groups_of(row, logits[t], 4, 2)
        for e in range(E):
            expected = row[e].item() if e // 2 in groups else -torch.inf
            assert ranks[t, e].item() == pytest.approx(expected)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, int, int, int]:
    num_groups = draw(st.integers(1, 5))
    size = draw(st.integers(1, 4))
    top_groups = draw(st.integers(1, num_groups))
    top_k = draw(st.integers(1, top_groups * size))
    num_experts = num_groups * size
    # Few different numbers, so that ties between experts and between groups occur.
    rows = draw(st.integers(0, 4))
    numbers = st.integers(-3, 3).map(float)
    logits = draw(st.lists(numbers, min_size=rows * num_experts, max_size=rows * num_experts))
    biases = st.lists(numbers.map(lambda b: b / 2), min_size=num_experts, max_size=num_experts)
    bias = draw(st.none() | biases)
    return (
        torch.tensor(logits, dtype=F64).reshape(rows, num_experts),
        None if bias is None else torch.tensor(bias, dtype=F64),
        num_groups,
        top_groups,
        top_k,
    )


# Three groups whose sigmoids add up to 1: the last one has the larger exp(logit).
EQUAL_SUMS = (
    torch.tensor([[0.0, 0.0, 0.0, 0.0, 3.0, -3.0]], dtype=F64),
    torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, -0.5], dtype=F64),
)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@given(case=cases())
@example(case=(torch.zeros(1, 6), torch.full((6,), -1.0), 3, 1, 2))
@example(case=(torch.zeros(1, 4), None, 4, 4, 4))
@example(case=(*EQUAL_SUMS, 3, 1, 1))
def test_equals_the_loop(
    score_function: str, case: tuple[Tensor, Tensor | None, int, int, int]
) -> None:
    logits, bias, num_groups, top_groups, top_k = case
    num_experts = logits.shape[1]
    estimator = bound(
        num_groups,
        top_groups,
        top_k=top_k,
        num_experts=num_experts,
        score_function=score_function,
    )
    scores = estimator.probs(logits)
    if bias is not None:
        scores = scores + bias
    if bias is None and num_groups == 1:
        scores = logits  # their order is that of their softmax, except for rounding
    got = estimator.select(logits, selection_bias=bias)
    assert torch.equal(got, choose(scores, logits, num_groups, top_groups, top_k))
    size = num_experts // num_groups
    for row in got.tolist():
        assert len({e // size for e in row}) <= top_groups
        assert len(set(row)) == top_k


@pytest.mark.parametrize(("num_groups", "top_groups"), [(1, 1), (4, 4), (8, 8), (2, 2)])
def test_all_groups_are_no_limit(num_groups: int, top_groups: int) -> None:
    moe = make(num_groups, top_groups)
    routing = moe(torch.randn(T, H, dtype=F64)).routing
    assert torch.equal(routing.selected, routing.logits.topk(K).indices)


def test_groups_of_one_expert() -> None:
    """The K best groups are the K best experts."""
    routing = make(E, K)(torch.randn(T, H, dtype=F64)).routing
    assert torch.equal(routing.selected, routing.logits.topk(K).indices)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
def test_the_layer_chooses_by_groups_and_weighs_without(score_function: str, biased: bool) -> None:
    options = {"balance": Balance(selection_bias_rate=0.01)} if biased else {}
    moe = make(gate={"score_function": score_function}, **options)
    if biased:
        moe.selection_bias = torch.randn(E, dtype=F64) - 2.0  # all scores are negative
    x = torch.randn(T, H, dtype=F64)
    mask = torch.rand(T) > 0.2
    output = moe(x, token_mask=mask)
    output.hidden_states.square().sum().backward()
    logits = output.routing.logits.detach()
    p = logits.softmax(1) if score_function == "softmax" else logits.sigmoid()
    chosen = choose(p + moe.selection_bias if biased else p, logits, 4, 2, K)
    assert torch.equal(output.routing.selected[mask], chosen[mask])
    assert (output.routing.selected[~mask] == -1).all()
    assert not torch.equal(chosen, logits.topk(K).indices)
    weights = p.gather(1, chosen)
    weights = weights / weights.sum(1, keepdim=True)
    assert_close(output.routing.weights[mask], weights[mask])

    got = gradients(moe)
    told = copy.deepcopy(moe)
    told.zero_grad()
    told.estimator.select = lambda *_, **__: chosen.masked_fill(~mask.unsqueeze(1), -1)
    told(x, token_mask=mask).hidden_states.square().sum().backward()
    for name, gradient in gradients(told).items():
        assert torch.equal(got[name], gradient), name


@pytest.mark.parametrize("name", ["straight_through", "straight_through_dense", "default_vector"])
def test_other_estimators_choose_the_same(name: str) -> None:
    normalize = "none" if name == "default_vector" else "topk"
    moe, exact = (make(gate={"estimator": e, "normalize": normalize}) for e in (name, "exact"))
    exact.router.load_state_dict(moe.router.state_dict())
    x = torch.randn(T, H, dtype=F64)
    got = moe(x)
    (got.hidden_states.square().sum() + got.aux_loss).backward()
    assert torch.equal(got.routing.selected, exact(x).routing.selected)
    assert not torch.equal(got.routing.selected, got.routing.logits.topk(K).indices)
    assert gradients(moe)["router.weight"].abs().sum() > 0


def test_gumbel_draws_from_few_groups() -> None:
    moe = make(gate={"estimator": "gumbel_straight_through"})
    x = torch.randn(200, H, dtype=F64)
    drawn = moe(x).routing.selected
    assert not torch.equal(drawn, moe(x).routing.selected)
    assert all(len({e // 2 for e in row}) <= 2 for row in drawn.tolist())
    assert drawn.unique().numel() == E
    routing = moe.eval()(x).routing
    assert torch.equal(routing.selected, choose(routing.logits.sigmoid(), routing.logits, 4, 2, K))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_always_k_experts_come_out(bad: float) -> None:
    logits = torch.randn(6, E)
    logits[0] = bad
    logits[1, 3] = bad
    logits[2, 4:] = bad
    for score_function in ("softmax", "sigmoid"):
        estimator = bound(4, 2, score_function=score_function)
        ids = estimator.select(logits)
        assert ((ids >= 0) & (ids < E)).all()
        assert all(len(set(row)) == K for row in ids.tolist())
        assert torch.equal(ids[3:], choose(estimator.probs(logits[3:]), logits[3:], 4, 2, K))


# --- rerouting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", ["next_best", "backup"])
@pytest.mark.parametrize("order", ["choice", "token"])
def test_rerouting_stays_in_the_groups_while_they_have_room(overflow: str, order: str) -> None:
    backup = {"backup": (1, 0, 3, 2, 5, 4, 7, 6)} if overflow == "backup" else {}
    moe = make(2, 1, capacity=Capacity(1, order=order, overflow=overflow, **backup))
    with torch.no_grad():
        moe.router.weight[0] *= 3  # a load that overflows
    x = torch.randn(60, H, dtype=F64)
    routing = moe(x).routing
    capacity = -(-60 * K // E)
    full = routing.kept_per_expert == capacity
    rerouted = (routing.indices != routing.selected) & (routing.indices >= 0)
    inside = 0
    for t, j in rerouted.nonzero().tolist():
        group = routing.selected[t, j] // 4
        row = routing.indices[t].tolist()
        if row[j] // 4 == group:
            inside += 1
        else:
            named = {*row, *routing.selected[t].tolist()}
            assert all(full[e] for e in range(group * 4, group * 4 + 4) if e not in named)
    assert 0 < inside < int(rerouted.sum())
    scores = moe.estimator.rank(routing.logits)
    expected = reference.limit_capacity(
        routing.selected,
        torch.full((E,), capacity),
        order=order,
        overflow=overflow,
        scores=scores,  # -inf outside the groups, where the logits decide
        tie_break=routing.logits.detach(),
        **({"backup": torch.tensor(backup["backup"])} if backup else {}),
    )
    assert torch.equal(routing.indices, expected)


# --- torch and Transformers ---------------------------------------------------------------------


def test_compiles_once_for_all_token_counts() -> None:
    moe = make(balance=Balance(selection_bias_rate=0.01), dtype=torch.float32)
    moe.update(moe(torch.randn(T, H)).routing)
    check_compiled_once(moe, H)


def test_repr() -> None:
    assert "num_groups=4, top_groups=2" in repr(make())
    assert "groups" not in repr(make(1, 1))


@pytest.mark.parametrize(("num_groups", "top_groups"), [(4, 2), (2, 1), (1, 1), (4, 4)])
def test_equals_the_router_of_transformers(num_groups: int, top_groups: int) -> None:
    pytest.importorskip("transformers")
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    router = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=H,
            n_routed_experts=E,
            n_group=num_groups,
            topk_group=top_groups,
            num_experts_per_tok=K,
            routed_scaling_factor=1.0,
        )
    )
    torch.nn.init.normal_(router.weight)
    # Positive biases: older versions mask with 0.0, which only then does what ours does.
    router.e_score_correction_bias.uniform_(0, 0.5)
    moe = make(
        num_groups, top_groups, balance=Balance(selection_bias_rate=0.01), dtype=torch.float32
    )
    with torch.no_grad():
        moe.router.weight.copy_(router.weight)
        moe.selection_bias.copy_(router.e_score_correction_bias)
    x = torch.randn(300, H)
    routing = moe(x).routing
    _, weights, indices = router(x)
    order = indices.argsort(1)
    mine = routing.selected.argsort(1)
    assert torch.equal(routing.selected.gather(1, mine), indices.gather(1, order))
    # A sigmoid, a sum of K and a division in float32 on either side.
    assert_close(routing.weights.gather(1, mine), weights.gather(1, order), rtol=0, atol=2e-6)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_groups": 0}, ValueError, r"Gate: num_groups must be >= 1, got 0"),
        ({"top_groups": 0}, ValueError, r"Gate: top_groups must be >= 1, got 0"),
        ({"num_groups": 2.0}, TypeError, r"Gate: num_groups must be an int, got 2.0"),
        ({"top_groups": True}, TypeError, r"Gate: top_groups must be an int, got True"),
        (
            {"num_groups": 2, "top_groups": 3},
            ValueError,
            r"Gate: top_groups must be in \[1, 2\], the number of groups, got 3",
        ),
    ],
)
def test_gate_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        Gate(**options)


@pytest.mark.parametrize(
    ("num_groups", "top_groups", "top_k", "message"),
    [
        (3, 1, 2, r"MoE: gate.num_groups must divide num_experts 8, got 3"),
        (16, 1, 2, r"MoE: gate.num_groups must divide num_experts 8, got 16"),
        (
            4,
            1,
            3,
            r"MoE: top_k must be in \[1, 2\], the experts of gate.top_groups 1, got 3",
        ),
        (
            8,
            2,
            3,
            r"MoE: top_k must be in \[1, 2\], the experts of gate.top_groups 2, got 3",
        ),
    ],
)
def test_layer_errors(num_groups: int, top_groups: int, top_k: int, message: str) -> None:
    gate = Gate(num_groups=num_groups, top_groups=top_groups)
    with pytest.raises(ValueError, match=f"^{message}$"):
        MoE(H, INNER, E, top_k, gate=gate)
    MoE(H, INNER, E, min(top_k, 2), gate=Gate(num_groups=4, top_groups=1))


@pytest.mark.parametrize("estimator", ["sparsemixer", SparseMixer()])
def test_sparsemixer_refuses_groups(estimator: str | SparseMixer) -> None:
    message = (
        r"^MoE: gate.num_groups must be 1 for the estimator SparseMixer, whose gradient is "
        r"that of a draw from the softmax, got 4$"
    )
    with pytest.raises(ValueError, match=message):
        make(gate={"score_function": "softmax", "estimator": estimator})
    MoE(H, INNER, E, K, gate=Gate(estimator=estimator, num_groups=1))


def test_one_estimator_cannot_serve_layers_with_other_groups() -> None:
    estimator = Exact()
    make(4, 2, gate={"estimator": estimator})
    make(4, 2, gate={"estimator": estimator})
    with pytest.raises(ValueError, match=r"^MoE: gate.estimator must be an instance of its own"):
        make(4, 3, gate={"estimator": estimator})
