"""Where the fractions of load_balancing_loss come from."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from balance_layers import every_source
from balanced import (
    F64,
    RING,
    B,
    E,
    H,
    K,
    S,
    T,
    balance,
    counts_of,
    gradient_of,
    make,
    plain_loss,
    shares_of,
)
from plain_moe import gradients, tensors_of
from torchmoe import ops
from torchmoe.nn import Assistance, Balance, Capacity, Gate, Router, WithAttachedLoss

# --- where the fractions come from --------------------------------------------------------------


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("choices", ["all", "first"])
@pytest.mark.parametrize("fraction_from", ["batch", "global_batch"])
@pytest.mark.parametrize("masked", [False, True])
def test_from_the_batch(
    fraction_from: str, choices: str, score_function: str, masked: bool
) -> None:
    """In one process the global batch is the batch."""
    moe = make(
        balance=Balance(fraction_from=fraction_from, fraction_choices=choices),
        gate=Gate(score_function),
        capacity=Capacity(0.5),  # what is dropped counts all the same
    )
    x = torch.randn(B, S, H, dtype=F64)
    mask = torch.rand(B, S) > 0.4 if masked else None
    routing = moe(x, token_mask=mask).routing
    counted = torch.ones(T, dtype=torch.bool) if mask is None else mask.flatten()
    logits = routing.logits[counted]
    ids = logits.topk(K).indices[:, : 1 if choices == "first" else K]
    expected = plain_loss(counts_of(ids) / ids.numel(), shares_of(logits, score_function))
    assert_close(balance(routing), expected)
    assert_close(gradient_of(balance(routing), moe), gradient_of(expected, moe))


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("choices", ["all", "first"])
@pytest.mark.parametrize("shape", [(B, S), (2, 3, 4), (S,), (), (1, 5), (4, 1)])
def test_from_each_sequence(shape: tuple[int, ...], choices: str, score_function: str) -> None:
    moe = make(
        balance=Balance(fraction_from="sequence", fraction_choices=choices),
        gate=Gate(score_function),
    )
    x = torch.randn(*shape, H, dtype=F64)
    masks = [None, torch.ones(shape, dtype=torch.bool)]
    if math.prod(shape) > 4:
        masks.append(torch.rand(shape) > 0.4)
    if len(shape) == 2 and shape[0] > 1:
        empty = torch.rand(shape) > 0.4
        empty[0] = True
        empty[1] = False  # a sequence that is all padding
        masks.append(empty)
    length = shape[-1] if shape else 1
    for mask in masks:
        routing = moe(x, token_mask=mask).routing
        terms = []
        for first in range(0, routing.logits.shape[0], length):
            rows = range(first, first + length)
            counted = [t for t in rows if mask is None or mask.flatten()[t]]
            if counted:
                logits = routing.logits[counted]
                ids = logits.topk(K).indices[:, : 1 if choices == "first" else K]
                fraction = counts_of(ids) / ids.numel()
                terms.append(plain_loss(fraction, shares_of(logits, score_function)))
        expected = sum(terms) / len(terms)
        assert_close(balance(routing), expected)
        assert_close(gradient_of(balance(routing), moe), gradient_of(expected, moe))


def test_one_sequence_is_a_batch() -> None:
    sequence, batch = make(balance=Balance(fraction_from="sequence")), make()
    batch.load_state_dict(sequence.state_dict())
    x = torch.randn(S, H, dtype=F64)
    assert_close(balance(sequence(x).routing), balance(batch(x).routing))
    x = torch.randn(B, S, H, dtype=F64)
    of_sequences = [balance(batch(row).routing) for row in x]
    assert_close(balance(sequence(x).routing), sum(of_sequences) / B)
    assert not torch.allclose(balance(sequence(x).routing), balance(batch(x).routing))


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_from_history(score_function: str) -> None:
    moe = make(balance=Balance(fraction_from="history"), gate=Gate(score_function))
    assert "router.usage" in moe.state_dict()
    x, mask = torch.randn(B, S, H, dtype=F64), torch.rand(B, S) > 0.3
    # An even history: 1, whatever the batch.
    assert_close(balance(moe(x).routing), torch.ones((), dtype=F64))
    for _ in range(3):
        moe.update(moe(x[:1]).routing)
    usage = moe.router.usage.clone()
    assert not torch.allclose(usage, torch.full((E,), 1 / E, dtype=F64))
    for token_mask in (None, mask):
        routing = moe(x, token_mask=token_mask).routing
        logits = routing.logits if token_mask is None else routing.logits[mask.flatten()]
        expected = plain_loss(usage, shares_of(logits, score_function))
        assert_close(balance(routing), expected)
        assert_close(gradient_of(balance(routing), moe), gradient_of(expected, moe))
    assert torch.equal(moe.router.usage, usage)


def test_from_the_history_of_a_router_of_ones_own() -> None:
    router = Router(H, E, usage_scaling=True, dtype=F64)
    moe = make(balance=Balance(fraction_from="history"), router=router)
    router.usage.copy_(torch.arange(E) / 28)
    routing = moe(torch.randn(T, H, dtype=F64)).routing
    assert_close(balance(routing), plain_loss(router.usage, shares_of(routing.logits)))


@every_source
def test_without_a_counted_token_it_is_zero(fraction_from: str) -> None:
    moe = make(balance=Balance(fraction_from=fraction_from))
    for shape in ((0,), (0, S), (B, 0), (B, S)):
        x = torch.randn(*shape, H, dtype=F64)
        mask = torch.zeros(shape, dtype=torch.bool)
        for token_mask in (mask, None) if x.numel() == 0 else (mask,):
            output = moe(x, token_mask=token_mask)
            assert output.aux_loss == 0
            moe.zero_grad()
            output.aux_loss.backward()
            assert (moe.router.weight.grad == 0).all()


@every_source
def test_capacity_and_assistance_do_not_touch_the_fractions(fraction_from: str) -> None:
    plain = make(balance=Balance(fraction_from=fraction_from))
    x = torch.randn(B, S, H, dtype=F64)
    for options in (
        {"capacity": Capacity(0.3)},
        {"capacity": Capacity(0.3, overflow="next_best", dynamic=True)},
        {"assistance": Assistance(RING)},
    ):
        moe = make(balance=Balance(fraction_from=fraction_from), **options)
        moe.load_state_dict(plain.state_dict(), strict=False)
        if moe.assistance is not None:
            moe.assistance.assisted[:] = True
        routing = moe(x).routing
        assert not torch.equal(routing.kept_per_expert, routing.tokens_per_expert)
        assert torch.equal(balance(routing), balance(plain(x).routing))


# --- earlier micro-batches ----------------------------------------------------------------------


@pytest.mark.parametrize("choices", ["all", "first"])
@pytest.mark.parametrize("fraction_from", ["batch", "global_batch"])
def test_earlier_counts_make_the_last_fraction_that_of_the_whole(
    fraction_from: str, choices: str
) -> None:
    moe = make(balance=Balance(fraction_from=fraction_from, fraction_choices=choices))
    x = torch.randn(8, S, H, dtype=F64)
    last = slice(None, 1 if choices == "first" else None)
    earlier = None
    for micro_batch in x:
        routing = moe(micro_batch, earlier_counts=earlier).routing
        counts = ops.dispatch_plan(routing.selected[:, last], E).expert_offsets.diff()
        if choices == "all":
            assert torch.equal(counts, routing.tokens_per_expert)  # of this call alone
        earlier = counts if earlier is None else earlier + counts
    whole = moe(x).routing
    ids = whole.selected[:, last]
    fraction = counts_of(ids) / ids.numel()
    expected = plain_loss(fraction, shares_of(routing.logits))
    assert_close(balance(routing), expected)
    assert_close(gradient_of(balance(routing), moe), gradient_of(expected, moe))
    assert not torch.allclose(balance(moe(x[-1]).routing), expected)
    assert_close(plain_loss(fraction, shares_of(whole.logits)), balance(whole))


def test_earlier_counts_change_nothing_but_the_fractions() -> None:
    moe = make(
        capacity=Capacity(1.0),
        balance=Balance(z_loss_weight=0.1, losses=[("importance_loss", 0.1)]),
    )
    x = torch.randn(T, H, dtype=F64)
    for earlier in (torch.arange(E), torch.arange(E, dtype=torch.int32)):
        with_counts, without = moe(x, earlier_counts=earlier), moe(x)
        got, plain = with_counts.routing, without.routing
        assert torch.equal(with_counts.hidden_states, without.hidden_states)
        for name, tensor in tensors_of(plain).items():
            if name != "load_balancing_loss":
                assert torch.equal(tensors_of(got)[name], tensor), name
        fraction = (plain.tokens_per_expert + torch.arange(E)).double()
        expected = plain_loss(fraction / fraction.sum(), shares_of(plain.logits))
        assert_close(balance(got), expected)
    none = torch.zeros(E, dtype=torch.int64)
    assert torch.equal(balance(moe(x, earlier_counts=none).routing), balance(plain))


def test_earlier_counts_with_a_batch_that_is_all_padding() -> None:
    moe = make()
    x = torch.randn(T, H, dtype=F64)
    nothing = torch.zeros(T, dtype=torch.bool)
    output = moe(x, token_mask=nothing, earlier_counts=torch.arange(E))
    assert output.aux_loss == 0


def test_with_attached_loss_passes_them_on() -> None:
    moe = make()
    x = torch.randn(T, H, dtype=F64)
    earlier = torch.arange(E) * 10
    (moe(x).hidden_states.sum() + moe(x, earlier_counts=earlier).aux_loss).backward()
    expected = gradients(moe)
    moe.zero_grad()
    WithAttachedLoss(moe)(x, earlier_counts=earlier).sum().backward()
    assert_close(gradients(moe), expected)
