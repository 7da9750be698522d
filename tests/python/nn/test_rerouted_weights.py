"""The weights of rerouted slots, and a capacity that follows history."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.testing import assert_close

import reference
from capacity_layers import RING, E, H, K, T, make
from limited import F64
from plain_moe import gradients
from torchmoe import dynamic_capacity
from torchmoe.nn import Balance, Capacity, Gate, MoE, Router

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
