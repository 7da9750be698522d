"""Balance without a loss: update_selection_bias, and the layer that applies it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.testing import assert_close

from float_types import FLOATS, NARROW
from plain_moe import gradients, tensors_of
from torchmoe import update_selection_bias
from torchmoe.nn import Balance, Capacity, Gate, MoE, Router

H, INNER, E, K, T = 6, 7, 5, 2, 23
F64 = torch.float64


def no_experts(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return x * weights.sum(1, keepdim=True)


BALANCE = Balance()


def make(rate: float = 0.01, balance: Balance = BALANCE, **options: Any) -> MoE:
    return MoE(
        H,
        INNER,
        E,
        K,
        balance=replace(balance, selection_bias_rate=rate),
        **({"gate": Gate("sigmoid"), "dtype": F64} | options),
    )


# --- the function -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "centred", "moves"),
    [
        # Mean 4.
        ([4, 1, 7, 4], False, [0, 1, -1, 0]),
        ([4, 1, 7, 4], True, [0, 1, -1, 0]),
        # Mean 2.5: three below, one above.
        ([1, 2, 2, 5], False, [1, 1, 1, -1]),
        ([1, 2, 2, 5], True, [0.5, 0.5, 0.5, -1.5]),
        ([3, 3, 3, 3], False, [0, 0, 0, 0]),
        ([0, 0, 0, 0], False, [0, 0, 0, 0]),
        ([0, 0, 0, 0], True, [0, 0, 0, 0]),
        ([8, 0, 0, 0], True, [-1.5, 0.5, 0.5, 0.5]),
    ],
)
def test_worked_by_hand(counts: list[int], centred: bool, moves: list[float]) -> None:
    bias = torch.tensor([0.5, -0.25, 0.0, 1.0], dtype=F64)
    # A rate that is a power of 2, so that nothing is rounded.
    got = update_selection_bias(bias, torch.tensor(counts), 0.125, centred)
    assert torch.equal(got, bias + 0.125 * torch.tensor(moves, dtype=F64))
    assert torch.equal(update_selection_bias(bias, torch.tensor(counts), 0.0, centred), bias)


def test_gives_a_new_tensor_and_leaves_the_old_alone() -> None:
    bias, counts = torch.zeros(3), torch.tensor([0, 0, 0])
    for _ in range(2):
        got = update_selection_bias(bias, counts, 0.1)
        assert got is not bias
        assert got.data_ptr() != bias.data_ptr()
        assert (bias == 0).all()
        counts = torch.tensor([1, 2, 9])
    assert got.tolist() == pytest.approx([0.1, 0.1, -0.1])


@pytest.mark.parametrize("dtype", FLOATS)
def test_keeps_the_dtype_of_the_bias(dtype: torch.dtype) -> None:
    bias = torch.zeros(3, dtype=dtype)
    for counts in (torch.tensor([1, 2, 9]), torch.tensor([1, 2, 9], dtype=torch.int32)):
        got = update_selection_bias(bias, counts, 0.25)
        assert got.dtype == dtype
        assert got.tolist() == [0.25, 0.25, -0.25]


def test_counts_beyond_float32_are_told_apart() -> None:
    counts = torch.tensor([2**40, 2**40 + 1, 2**40 - 1])
    assert update_selection_bias(torch.zeros(3), counts, 1.0).tolist() == [0, -1, 1]


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=9),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
def test_centred_keeps_the_mean(counts: list[int], rate: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(len(counts), generator=generator, dtype=F64)
    tensor = torch.tensor(counts)
    got = update_selection_bias(bias, tensor, rate, True)
    # A handful of roundings of numbers of order one.
    assert_close(got.mean(), bias.mean(), rtol=0, atol=1e-14)
    # The differences between experts are those without.
    free = update_selection_bias(bias, tensor, rate)
    assert_close(got - got[0], free - free[0], rtol=0, atol=1e-14)
    mean = sum(counts) / len(counts)
    for before, after, count in zip(bias, free, counts, strict=True):
        assert after.item() == before.item() + rate * ((count < mean) - (count > mean))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rate": -0.1}, ValueError, r"rate must be a finite number >= 0, got -0.1"),
        ({"rate": math.nan}, ValueError, r"rate must be a finite number >= 0, got nan"),
        ({"rate": math.inf}, ValueError, r"rate must be a finite number >= 0, got inf"),
        (
            {"bias": torch.zeros(1, 3)},
            RuntimeError,
            r"bias must be \[num_experts\] and floating, got torch.float32 of shape \[1, 3\]",
        ),
        (
            {"bias": torch.zeros(3).long()},
            RuntimeError,
            r"bias must be \[num_experts\] and floating, got torch.int64 of shape \[3\]",
        ),
        (
            {"tokens_per_expert": torch.zeros(4).long()},
            RuntimeError,
            r"tokens_per_expert must be numbers \[num_experts\] = \[3\], got .* of shape \[4\]",
        ),
        (
            {"tokens_per_expert": torch.tensor([1.0, math.nan, 2.0])},
            ValueError,
            r"tokens_per_expert must be finite and >= 0, got nan",
        ),
        (
            {"tokens_per_expert": torch.tensor([1, 2, -3])},
            ValueError,
            r"tokens_per_expert must be finite and >= 0, got -3",
        ),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"bias": torch.zeros(3), "tokens_per_expert": torch.zeros(3).long(), "rate": 0.1}
    update_selection_bias(**good)
    with pytest.raises(error, match=f"^update_selection_bias: {message}$"):
        update_selection_bias(**(good | change))


# --- the layer ----------------------------------------------------------------------------------


def test_a_layer_has_a_bias_only_with_a_rate() -> None:
    assert make(0.0).selection_bias is None
    assert "selection_bias" not in make(0.0).state_dict()
    moe = make()
    assert torch.equal(moe.state_dict()["selection_bias"], torch.zeros(E, dtype=F64))
    assert "selection_bias" not in dict(moe.named_parameters())


@pytest.mark.parametrize("centred", [False, True])
def test_moves_in_update_only(centred: bool) -> None:
    moe = make(balance=Balance(selection_bias_centred=centred))
    x = torch.randn(3, T, H, dtype=F64)
    for mode in (True, False):
        moe.train(mode)
        output = moe(x)
        (output.hidden_states.sum() + output.aux_loss).backward()
        assert (moe.selection_bias == 0).all()
    counts = output.routing.tokens_per_expert
    for _ in range(2):
        before = moe.selection_bias.clone()
        moe.update(output.routing)
        expected = update_selection_bias(before, counts, 0.01, centred)
        assert torch.equal(moe.selection_bias, expected)
        assert not torch.equal(moe.selection_bias, before)
    if centred:
        assert moe.selection_bias.mean().abs() < 1e-16
        assert update_selection_bias(before, counts, 0.01).mean().abs() > 1e-4


def test_micro_batches_are_summed_before_the_sign() -> None:
    moe = make()
    x = torch.randn(4, T, H, dtype=F64)
    parts = [moe(micro_batch).routing for micro_batch in x]
    one_by_one = copy.deepcopy(moe)
    for routing in parts:
        one_by_one.update(routing)
    moe.update(parts)
    counts = sum(routing.tokens_per_expert for routing in parts)
    expected = update_selection_bias(torch.zeros(E, dtype=F64), counts, 0.01)
    assert torch.equal(moe.selection_bias, expected)
    assert not torch.allclose(one_by_one.selection_bias, expected)


def test_the_counts_are_those_before_capacity_and_of_counted_tokens() -> None:
    moe = make(capacity=Capacity(0.3))
    x, mask = torch.randn(T, H, dtype=F64), torch.rand(T) > 0.3
    routing = moe(x, token_mask=mask).routing
    assert routing.kept_per_expert.sum() < routing.tokens_per_expert.sum()
    moe.update(routing)
    chosen = routing.logits.sigmoid().topk(K).indices[mask]
    counts = chosen.flatten().bincount(minlength=E)
    expected = update_selection_bias(torch.zeros(E, dtype=F64), counts, 0.01)
    assert torch.equal(moe.selection_bias, expected)
    # Nothing was counted: nothing moves.
    moe.update(moe(x, token_mask=torch.zeros(T, dtype=torch.bool)).routing)
    assert torch.equal(moe.selection_bias, expected)


def test_the_rate_may_change() -> None:
    moe = make(0.01)
    routing = moe(torch.randn(T, H, dtype=F64)).routing
    moe.update(routing)
    step = moe.selection_bias.clone()
    moe.balance = replace(moe.balance, selection_bias_rate=0.0)
    moe.update(routing)
    assert torch.equal(moe.selection_bias, step)
    moe.balance = replace(moe.balance, selection_bias_rate=0.02)
    moe.update(routing)
    assert_close(moe.selection_bias, 3 * step)


def test_a_bias_of_ones_own_without_a_rate_stays() -> None:
    moe = make(0.0)
    moe.selection_bias = torch.arange(E, dtype=F64)
    moe.update(moe(torch.randn(T, H, dtype=F64)).routing)
    assert torch.equal(moe.selection_bias, torch.arange(E, dtype=F64))


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", ["none", "topk"])
def test_ranks_but_never_weighs(score_function: str, normalize: str) -> None:
    """Values and gradients are those of a layer without a bias that was told the choice."""
    moe = make(gate=Gate(score_function, normalize), balance=Balance(z_loss_weight=0.01))
    with torch.no_grad():
        moe.selection_bias.copy_(torch.tensor([0.4, -0.3, 0.0, 0.2, -0.1]))
    x = torch.randn(T, H, dtype=F64)
    output = moe(x)
    output.hidden_states.square().sum().backward()
    got = gradients(moe)

    logits = output.routing.logits
    scores = logits.softmax(1) if score_function == "softmax" else logits.sigmoid()
    chosen = (scores + moe.selection_bias).topk(K).indices
    assert torch.equal(output.routing.selected, chosen)
    assert not torch.equal(chosen, scores.topk(K).indices)

    told = copy.deepcopy(moe)
    told.zero_grad()
    told.selection_bias = None
    told.estimator.select = lambda *_, **__: chosen
    expected = told(x)
    expected.hidden_states.square().sum().backward()
    assert torch.equal(output.hidden_states, expected.hidden_states)
    for name, tensor in tensors_of(expected.routing).items():
        assert torch.equal(tensors_of(output.routing)[name], tensor), name
    for name, gradient in gradients(told).items():
        assert torch.equal(got[name], gradient), name
    weights = scores.gather(1, chosen)
    if normalize == "topk":
        weights = weights / weights.sum(1, keepdim=True)
    assert_close(output.routing.weights, weights)


@pytest.mark.parametrize("dtype", NARROW)
def test_stays_wide_in_a_narrow_layer(dtype: torch.dtype) -> None:
    moe = make(1e-3, dtype=torch.float32)
    moe.update(moe(torch.randn(T, H)).routing)
    before = moe.selection_bias.clone()
    moe.to(dtype)
    assert moe.router.weight.dtype == dtype
    assert moe.selection_bias.dtype == torch.float32
    assert torch.equal(moe.selection_bias, before)
    # In bfloat16 the hundredth step of 0.001 would be lost.
    routing = moe(torch.randn(T, H, dtype=dtype)).routing
    for _ in range(600):
        moe.update(routing)
    moves = update_selection_bias(torch.zeros(E), routing.tokens_per_expert, 1e-3)
    assert_close(moe.selection_bias, before + 600 * moves, rtol=1e-4, atol=0)
    assert make(dtype=dtype).selection_bias.dtype == torch.float32
    assert moe.double().selection_bias.dtype == F64


def test_evens_out_a_collapsed_router() -> None:
    moe = make(0.01, experts=no_experts, router=Router(H, E, bias=True, dtype=F64))
    with torch.no_grad():
        moe.router.bias.copy_(torch.tensor([3.0, 2.0, 0.0, 0.0, 0.0]))
    x = torch.randn(200, H, dtype=F64)
    first = moe(x).routing.tokens_per_expert
    for _ in range(60):
        moe.update(moe(x).routing)
    last = moe(x).routing.tokens_per_expert
    even = 200 * K / E
    assert first.max() > 2 * even
    assert last.max() < 1.2 * even
    assert last.min() > 0.8 * even


def test_centred_keeps_the_mean_of_a_trained_bias() -> None:
    means = []
    for centred in (True, False):
        moe = make(0.02, balance=Balance(selection_bias_centred=centred), experts=no_experts)
        with torch.no_grad():
            moe.selection_bias.fill_(0.25)
        for _ in range(9):
            moe.update(moe(torch.randn(T, H, dtype=F64)).routing)
        means.append(moe.selection_bias.mean().item())
    assert means[0] == pytest.approx(0.25, abs=1e-14)
    assert means[1] != pytest.approx(0.25, abs=1e-3)


def test_repr_and_reset() -> None:
    moe = make(0.125, balance=Balance(selection_bias_centred=True))
    assert "selection_bias_rate=0.125, selection_bias_centred=True" in repr(moe)
    assert "selection_bias" not in repr(make(0.0))
    moe.update(moe(torch.randn(T, H, dtype=F64)).routing)
    moe.reset_parameters()
    assert (moe.selection_bias == 0).all()


@pytest.mark.parametrize(("rate", "got"), [(-1.0, "-1.0"), (math.nan, "nan"), (math.inf, "inf")])
def test_the_layers_rate_is_checked(rate: float, got: str) -> None:
    message = f"^Balance: selection_bias_rate must be a finite number >= 0, got {got}$"
    with pytest.raises(ValueError, match=message):
        make(rate)


def test_sparsemixer_refuses_a_bias() -> None:
    message = (
        r"^MoE: balance.selection_bias_rate must be 0 for the estimator SparseMixer, whose .*, "
        r"got 0.01$"
    )
    with pytest.raises(ValueError, match=message):
        make(gate=Gate(estimator="sparsemixer"))
    moe = make(0.0, gate=Gate(estimator="sparsemixer"))
    moe.selection_bias = torch.zeros(E, dtype=F64)
    with pytest.raises(ValueError, match=r"^SparseMixer: selection_bias must be None, .*, got one"):
        moe(torch.randn(T, H, dtype=F64))
