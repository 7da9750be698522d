"""What Capacity's options do in the layer: who is served, who is rerouted, and what is causal."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import reference
from limited import F64, by_logits
from plain_moe import gradients, tensors_of
from torchmoe import dynamic_capacity
from torchmoe.nn import Balance, Capacity, Gate, MoE, Router

H, INNER, E, K, T = 6, 7, 5, 2, 23
RING = (1, 2, 3, 4, 0)

pytestmark = pytest.mark.usefixtures("one_thread")


def make(capacity: Capacity | None, top_k: int = K, **options: Any) -> MoE:
    return MoE(H, INNER, E, top_k, capacity=capacity, **({"dtype": F64} | options))


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


@pytest.mark.parametrize(
    "estimator",
    [
        "exact",
        "straight_through",
        "straight_through_dense",
        "default_vector",
        "gumbel_straight_through",
        "sparsemixer",
    ],
)
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


# --- the weights of rerouted slots --------------------------------------------------------------


def expected_output(moe: MoE, x: Tensor, indices: Tensor, weighed: Tensor) -> tuple[Tensor, Tensor]:
    """y and weights in plain loops, for ids as routed and those that the weights are of."""
    logits = linear(x, moe.router.weight)
    estimator = moe.estimator
    name = type(estimator).__name__
    weights = reference.gate_weights(
        logits,
        weighed,
        score_function=estimator.score_function,
        normalize=estimator.normalize,
        estimator=estimator.gate_estimator,
    )
    experts = {
        "w_in": moe.experts.gate_up_proj,
        "b_in": None,
        "w_out": moe.experts.down_proj,
        "b_out": None,
        "activation": "swiglu",
    }
    dense = name == "StraightThroughDense"
    y = reference.expert_mlp(x, indices, weights.detach() if dense else weights, **experts)
    softmax = estimator.score_function == "softmax"
    probs = logits.softmax(1) if softmax else logits.sigmoid()
    if dense:
        y = reference.attach_dense_gradient(y, probs, x, **experts)
    if name == "DefaultVector":
        served = torch.stack([(indices == e).any(1) for e in range(E)], 1)
        y = y + (probs * ~served) @ estimator.default_vectors
    return y, weights


@pytest.mark.parametrize("overflow", ["next_best", "backup"])
@pytest.mark.parametrize("after_drop", [False, True])
@pytest.mark.parametrize(
    ("estimator", "score_function", "normalize"),
    [
        ("exact", "softmax", "topk"),
        ("exact", "sigmoid", "none"),
        ("straight_through", "sigmoid", "topk"),
        ("straight_through", "softmax", "uniform"),
        ("straight_through_dense", "softmax", "topk"),
        ("default_vector", "softmax", "none"),
        ("gumbel_straight_through", "softmax", "topk"),
    ],
)
def test_weights_are_those_of_the_new_experts(
    estimator: str, score_function: str, normalize: str, after_drop: bool, overflow: str
) -> None:
    capacity = Capacity(
        0.8,
        overflow=overflow,
        backup=RING if overflow == "backup" else None,
        normalize="after_drop" if after_drop else "before_drop",
    )
    gate = Gate(score_function, normalize, estimator)
    moe = make(capacity, gate=gate, balance=Balance(weight=0.0))
    moe.update(moe(torch.randn(T, H, dtype=F64)).routing)  # default vectors that are not 0
    x = torch.randn(T, H, dtype=F64, requires_grad=True)
    direction = torch.randn(T, H, dtype=F64)
    output = moe(x)
    (output.hidden_states * direction).sum().backward()
    got = gradients(moe) | {"x": x.grad.clone()}
    moe.zero_grad()
    x.grad = None

    selected, indices = output.routing.selected, output.routing.indices
    assert ((indices >= 0) & (indices != selected)).any()
    assert (indices == -1).any()
    weighed = indices if after_drop else indices.where(indices >= 0, selected)
    y, weights = expected_output(moe, x, indices, weighed)
    (y * direction).sum().backward()
    kept = indices >= 0
    assert_close(output.routing.weights[kept], weights[kept])
    assert_close(output.hidden_states, y)
    assert_close(got, gradients(moe) | {"x": x.grad})


def test_sparsemixer_weighs_the_new_experts_by_its_own_rule() -> None:
    moe = make(Capacity(0.8, overflow="next_best"), gate=Gate(estimator="sparsemixer")).eval()
    moe.estimator.jitter = 5.0
    routing = moe(torch.randn(T, H, dtype=F64)).routing
    moved = (routing.indices != routing.selected) & (routing.indices >= 0)
    assert moved.any()
    ids = routing.indices.where(routing.indices >= 0, routing.selected)
    z = routing.logits
    for t, row in enumerate(ids.tolist()):
        left = z[t].clone()
        for j, e in enumerate(row):
            most = left.max()
            far = (most - left) / torch.maximum(left.abs(), most) > 2 * 5.0
            q = left.masked_fill(far, -torch.inf).softmax(0)
            assert_close(routing.weights[t, j], q[e])
            left = left.masked_fill(torch.arange(E) == e, -torch.inf)


# --- a capacity that follows history ------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_dynamic_capacity_reads_the_routers_usage(masked: bool) -> None:
    moe = make(Capacity(0.8, eval_factor=0.5, dynamic=True))
    assert moe.router.usage is not None
    x = torch.randn(T, H, dtype=F64)
    mask = torch.rand(T) > 0.3 if masked else None
    counted = int(mask.sum()) if masked else T
    for usage in (torch.full((E,), 0.2), torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1])):
        moe.router.usage.copy_(usage)
        for factor in (0.8, 0.5):
            moe.train(factor == 0.8)
            routing = moe(x, token_mask=mask).routing
            room = dynamic_capacity(moe.router.usage, K * counted, factor).clamp(max=counted)
            expected = reference.limit_capacity(routing.selected, room)
            assert torch.equal(routing.indices, expected)
            assert torch.equal(
                routing.kept_per_expert, torch.minimum(routing.tokens_per_expert, room)
            )
    assert room.unique().numel() == 2


def test_dynamic_capacity_moves_with_update() -> None:
    moe = make(Capacity(1, dynamic=True), router=Router(H, E, bias=True, track_usage=True).double())
    with torch.no_grad():
        moe.router.bias[2] = 9.0
    x = torch.randn(T, H, dtype=F64)
    first = moe(x).routing
    assert first.kept_per_expert[2] == 10  # ceil(2 * 23 / 5), of 23 that ask
    assert torch.equal(moe(x).routing.indices, first.indices)
    kept = [10]
    for _ in range(4):
        for _ in range(30):
            moe.update(first)
        kept.append(int(moe(x).routing.kept_per_expert[2]))
    assert kept == sorted(kept)
    # Its share goes to 1/2, that is 2.5 times the mean: room for all 23.
    assert kept[-1] > 17
    moe.router.usage_decay = 0.0
    moe.update(first)
    assert moe(x).routing.kept_per_expert[2] == 23


def test_dynamic_capacity_with_rerouting_and_a_minimum() -> None:
    moe = make(Capacity(0.5, dynamic=True, overflow="next_best", minimum=6))
    moe.router.usage.copy_(torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1]))
    routing = moe(torch.randn(T, H, dtype=F64)).routing
    # 0.5 * 46 / 5 = 4.6, three times as much for expert 0.
    room = torch.tensor([14, 6, 6, 6, 6])
    expected = reference.limit_capacity(
        routing.selected, room, overflow="next_best", scores=routing.logits
    )
    assert torch.equal(routing.indices, expected)


# --- as part of a module ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "capacity",
    [
        Capacity(0.8, priority="random"),
        Capacity(0.8, priority="weight", overflow="next_best"),
        Capacity(0.8, overflow="backup", backup=RING, normalize="after_drop", rounding="down"),
        Capacity(0.8, dynamic=True, minimum=3),
    ],
    ids=["random", "weight_next_best", "backup", "dynamic"],
)
def test_compiles_once_for_all_token_counts(capacity: Capacity) -> None:
    moe = make(capacity, dtype=torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (11, 17, 40):
        x, mask = torch.randn(num_tokens, H), torch.rand(num_tokens) > 0.3
        seen = []
        for layer in (moe, compiled):
            moe.zero_grad()
            torch.manual_seed(2)
            output = layer(x, token_mask=mask)
            (output.hidden_states.square().sum() + output.aux_loss).backward()
            seen.append({"y": output.hidden_states} | tensors_of(output.routing) | gradients(moe))
        assert_close(seen[0], seen[1])
        moe.update(output.routing)
    assert counter.frame_count == 1


def test_a_dynamic_capacity_compiles_without_a_mask() -> None:
    moe = make(Capacity(0.8, dynamic=True), dtype=torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (11, 17, 40):
        x = torch.randn(num_tokens, H)
        assert_close(tensors_of(compiled(x).routing), tensors_of(moe(x).routing))
        moe.update(moe(x).routing)
    assert counter.frame_count == 1


def test_copies_keep_the_backup() -> None:
    moe = make(Capacity(0.8, overflow="backup", backup=list(RING)))
    x = torch.randn(T, H, dtype=F64)
    expected = moe(x).routing.indices
    for other in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert torch.equal(other(x).routing.indices, expected)
    with torch.device("meta"):
        empty = make(moe.capacity)
    empty = empty.to_empty(device="cpu")
    empty.reset_parameters()
    empty.load_state_dict(moe.state_dict())
    assert torch.equal(empty(x).routing.indices, expected)
    narrow = moe.bfloat16()
    assert bool((narrow(x.bfloat16()).routing.indices < E).all())


def test_capacity_is_a_value() -> None:
    capacity = Capacity(1.25, overflow="backup", backup=[1, 0], priority="weight")
    same = Capacity(1.25, overflow="backup", backup=(1, 0), priority="weight")
    assert capacity == same
    assert hash(capacity) == hash(same)
    assert capacity.backup == (1, 0)
    assert capacity != Capacity(1.25, overflow="backup", backup=(1, 0))
    assert pickle.loads(pickle.dumps(capacity)) == capacity
    for part in ("priority='weight'", "overflow='backup'", "backup=(1, 0)", "factor=1.25"):
        assert part in repr(capacity)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"priority": "age"},
            ValueError,
            r'priority must be one of "random", "weight", got "age"',
        ),
        (
            {"overflow": "spill"},
            ValueError,
            r'overflow must be one of "drop", "next_best", "backup", got "spill"',
        ),
        (
            {"overflow": "backup"},
            ValueError,
            r'backup must be given with overflow "backup", got None',
        ),
        (
            {"backup": (1, 0)},
            ValueError,
            r'backup must be None with overflow "drop", got \(1, 0\)',
        ),
        (
            {"backup": (1, 0), "overflow": "next_best"},
            ValueError,
            r'backup must be None with overflow "next_best", got \(1, 0\)',
        ),
        (
            {"backup": (1, 1), "overflow": "backup"},
            ValueError,
            r"backup must be another expert in \[0, 2\) for every expert, got 1 for expert 1",
        ),
        (
            {"backup": (1, 2), "overflow": "backup"},
            ValueError,
            r"backup must be another expert in \[0, 2\) for every expert, got 2 for expert 1",
        ),
        (
            {"backup": (-1, 0), "overflow": "backup"},
            ValueError,
            r"backup must be another expert in \[0, 2\) for every expert, got -1 for expert 0",
        ),
        (
            {"backup": (True, 0), "overflow": "backup"},
            TypeError,
            r"backup must be an int, got True",
        ),
        ({"minimum": 1.5}, TypeError, r"minimum must be an int, got 1.5"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^Capacity: {message}$"):
        Capacity(1.0, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"capacity": 1.25},
            TypeError,
            r"capacity must be a Capacity or None, such as Capacity\(1.25\), got 1.25",
        ),
        (
            {"capacity": Capacity(1, overflow="backup", backup=(1, 0))},
            ValueError,
            r"capacity.backup must have 5 entries, one for each expert, got 2",
        ),
        (
            {"capacity": Capacity(1, dynamic=True), "router": Router(H, E)},
            ValueError,
            r"router must keep usage for a dynamic capacity, as Router\(track_usage=True\) does, "
            r"got \w+ without",
        ),
    ],
)
def test_layer_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^MoE: {message}$"):
        MoE(H, INNER, E, K, **options)
