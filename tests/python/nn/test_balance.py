"""Balancing losses of the layer: where the fractions come from, further terms, and what holds."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from op_case import tolerance
from plain_moe import gradients, tensors_of
from torchmoe import losses, ops, update_selection_bias
from torchmoe.losses import LossInputs
from torchmoe.nn import Assistance, Capacity, Gate, MoE, Router, Routing, WithAttachedLoss

B, S, H, INNER, E, K = 3, 7, 6, 5, 8, 2
T = B * S
F64 = torch.float64
RING = (1, 2, 3, 4, 5, 6, 7, 0)
FROM = ("batch", "sequence", "global_batch", "history")
every_source = pytest.mark.parametrize("fraction_from", FROM)
TERMS = (
    "importance_loss",
    "load_loss",
    "local_entropy_loss",
    "global_entropy_loss",
    "mutual_information_loss",
    "router_z_loss",
)

pytestmark = pytest.mark.usefixtures("one_thread")


def make(**options: Any) -> MoE:
    return MoE(H, INNER, E, K, **({"dtype": F64} | options))


def largest_logit(given: LossInputs) -> Tensor:
    """A term of the user's own."""
    largest = given.logits.square().amax(1, keepdim=True)
    return ops.mean_over_tokens(largest, token_mask=given.token_mask).squeeze(0)


def everything(**options: Any) -> MoE:
    """A layer with all that concerns balance at once, in a state that is not the first one."""
    given: dict[str, Any] = {
        "gate": Gate("sigmoid", num_groups=4, top_groups=2),
        "capacity": Capacity(
            0.9, overflow="backup", backup=RING, dynamic=True, priority="random", minimum=1
        ),
        "assistance": Assistance(RING, threshold=1.0, lower_threshold=0.5, patience=2),
        "balance_weight": 0.5,
        "z_loss_weight": 0.25,
        "losses": [*((name, 0.125) for name in TERMS[:-1]), (largest_logit, 0.0625)],
        "fraction_from": "history",
        "selection_bias_rate": 0.125,
        "selection_bias_centred": True,
        "shared_experts": nn.Linear(H, H, dtype=options.get("dtype", F64)),
        "routed_scaling_factor": 2.5,
    } | options
    moe = make(**given)
    for _ in range(3):
        moe.update(moe(torch.randn(T, H, dtype=moe.router.weight.dtype)).routing)
    if moe.assistance is not None:
        assert moe.assistance.assisted.any()
    return moe


def shares_of(logits: Tensor, score_function: str = "softmax") -> Tensor:
    p = logits.softmax(-1) if score_function == "softmax" else logits.sigmoid()
    return p / p.sum(-1, keepdim=True)


def counts_of(ids: Tensor) -> Tensor:
    """How often each expert is named: by one loop."""
    counts = torch.zeros(E, dtype=F64)
    for e in ids.flatten().tolist():
        if e >= 0:
            counts[e] += 1
    return counts


def plain_loss(fraction: Tensor, shares: Tensor) -> Tensor:
    """E * sum_i f_i P_i for the shares [T, E] of the counted tokens."""
    return E * (fraction * shares.mean(0)).sum()


def balance(routing: Routing) -> Tensor:
    return routing.losses["load_balancing_loss"]


def gradient_of(loss: Tensor, moe: MoE) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, [moe.router.weight], retain_graph=True)
    return gradient


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
        fraction_from=fraction_from,
        fraction_choices=choices,
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
    moe = make(fraction_from="sequence", fraction_choices=choices, gate=Gate(score_function))
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
    sequence, batch = make(fraction_from="sequence"), make()
    batch.load_state_dict(sequence.state_dict())
    x = torch.randn(S, H, dtype=F64)
    assert_close(balance(sequence(x).routing), balance(batch(x).routing))
    x = torch.randn(B, S, H, dtype=F64)
    of_sequences = [balance(batch(row).routing) for row in x]
    assert_close(balance(sequence(x).routing), sum(of_sequences) / B)
    assert not torch.allclose(balance(sequence(x).routing), balance(batch(x).routing))


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_from_history(score_function: str) -> None:
    moe = make(fraction_from="history", gate=Gate(score_function))
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
    moe = make(fraction_from="history", router=router)
    router.usage.copy_(torch.arange(E) / 28)
    routing = moe(torch.randn(T, H, dtype=F64)).routing
    assert_close(balance(routing), plain_loss(router.usage, shares_of(routing.logits)))


@every_source
def test_without_a_counted_token_it_is_zero(fraction_from: str) -> None:
    moe = make(fraction_from=fraction_from)
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
    plain = make(fraction_from=fraction_from)
    x = torch.randn(B, S, H, dtype=F64)
    for options in (
        {"capacity": Capacity(0.3)},
        {"capacity": Capacity(0.3, overflow="next_best", dynamic=True)},
        {"assistance": Assistance(RING)},
    ):
        moe = make(fraction_from=fraction_from, **options)
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
    moe = make(fraction_from=fraction_from, fraction_choices=choices)
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
    moe = make(capacity=Capacity(1.0), z_loss_weight=0.1, losses=[("importance_loss", 0.1)])
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


# --- accumulating gradients ---------------------------------------------------------------------

STEPS = 8


def step_gradients(moe: MoE, batches: Sequence[Tensor]) -> tuple[dict[str, Tensor], float]:
    """Of the mean over the micro-batches of aux_loss, and that mean."""
    moe.zero_grad()
    total = 0.0
    for x in batches:
        output = moe(x)
        aux_loss = output.aux_loss / len(batches)
        (0 * output.hidden_states.sum() + aux_loss).backward()
        total += aux_loss.item()
    return gradients(moe), total


def differ(moe: MoE) -> bool:
    """Whether eight micro-batches give another gradient than one batch, beyond rounding."""
    x = torch.randn(STEPS, S, H, dtype=F64)
    one, eight = step_gradients(moe, [x]), step_gradients(moe, x.unsqueeze(1).unbind())
    longest = STEPS * S * max(K, H)
    within = abs(one[1] - eight[1]) <= tolerance(
        torch.tensor(one[1]), n=longest, wide=F64, stored=F64
    )
    for name, gradient in one[0].items():
        atol = tolerance(gradient, n=longest, wide=F64, stored=F64)
        within &= bool((gradient - eight[0][name]).abs().max() <= atol)
    assert one[0]["router.weight"].abs().max() > 1e-4
    return not within


@pytest.mark.parametrize(
    "options",
    [
        {"fraction_from": "sequence", "balance_weight": 1.0},
        {"fraction_from": "sequence", "fraction_choices": "first", "balance_weight": 1.0},
        {"fraction_from": "history", "balance_weight": 1.0},
        {"z_loss_weight": 1.0},
        {"losses": [("router_z_loss", 1.0)]},
        {"losses": [("local_entropy_loss", 1.0)]},
        {"fraction_from": "history", "balance_weight": 1.0, "gate": Gate("sigmoid")},
    ],
    ids=["sequence", "first", "history", "z", "z_by_name", "local_entropy", "sigmoid"],
)
def test_eight_micro_batches_are_one_batch(options: dict[str, Any]) -> None:
    """Exactly, where the term is a mean over tokens or sequences of what each of them gives."""
    moe = make(**({"balance_weight": 0.0} | options))
    if moe.router.usage is not None:
        moe.router.usage.copy_(torch.arange(E) / 28)
    assert not differ(moe)


@pytest.mark.parametrize(
    "options",
    [
        {"balance_weight": 1.0},
        {"balance_weight": 1.0, "fraction_from": "global_batch"},
        *[
            {"losses": [(name, 1.0)]}
            for name in (
                "importance_loss",
                "load_loss",
                "global_entropy_loss",
                "mutual_information_loss",
            )
        ],
    ],
    ids=["batch", "global", "importance", "load", "global_entropy", "mutual_information"],
)
def test_what_is_of_the_whole_batch_is_another_number_for_its_parts(
    options: dict[str, Any],
) -> None:
    """So the documentation must not promise it."""
    assert differ(make(**({"balance_weight": 0.0} | options)))


def test_eight_micro_batches_move_the_state_as_one_batch() -> None:
    options = {
        "selection_bias_rate": 0.01,
        "gate": Gate("sigmoid"),
        "assistance": Assistance(RING, threshold=1.0, lower_threshold=0.5, patience=1),
    }
    one = make(**options)
    eight = copy.deepcopy(one)
    x = torch.randn(STEPS, S, H, dtype=F64)
    one.update(one(x).routing)
    eight.update([eight(micro_batch).routing for micro_batch in x])
    assert one.assistance.assisted.any()
    assert (one.selection_bias != 0).any()
    for name, value in one.state_dict().items():
        assert torch.equal(eight.state_dict()[name], value), name


# --- padding changes nothing --------------------------------------------------------------------


def padded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every sequence at another place of a longer one, and whole sequences of padding between."""
    wide = torch.full((2 * B + 1, S + 5, H), torch.nan, dtype=F64)
    mask = torch.zeros(2 * B + 1, S + 5, dtype=torch.bool)
    for b in range(B):
        begin = (0, 5, 2)[b]
        wide[2 * b + 1, begin : begin + S] = x[b]
        mask[2 * b + 1, begin : begin + S] = True
    return wide, mask


CAPACITIES = {
    "none": None,
    "static": Capacity(0.7),
    "down": Capacity(0.7, rounding="down", order="token", minimum=1),
    "dynamic": Capacity(0.7, dynamic=True),
    "dynamic_next_best": Capacity(0.7, dynamic=True, overflow="next_best"),
    "weight_backup": Capacity(0.7, priority="weight", overflow="backup", backup=RING),
}


@every_source
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_padding_changes_nothing(fraction_from: str, capacity: str) -> None:
    moe = everything(fraction_from=fraction_from, capacity=CAPACITIES[capacity])
    alone = copy.deepcopy(moe)
    x = torch.randn(B, S, H, dtype=F64)
    wide, mask = padded(x)
    seen = []
    for layer, tokens, token_mask in ((moe, wide, mask), (alone, x, None)):
        leaf = tokens.clone().requires_grad_()
        output = layer(leaf, token_mask=token_mask)
        (output.hidden_states.square().sum() + output.aux_loss).backward()
        layer.update(output.routing)
        seen.append((output, leaf.grad))
    (got, grad), (expected, expected_grad) = seen

    assert (got.hidden_states[~mask] == 0).all()
    assert (grad[~mask] == 0).all()
    assert_close(got.hidden_states[mask], expected.hidden_states.flatten(0, 1))
    assert_close(grad[mask], expected_grad.flatten(0, 1))
    assert_close(got.aux_loss, expected.aux_loss)
    assert_close(got.routing.losses, expected.routing.losses)
    assert_close(gradients(moe), gradients(alone))
    flat = mask.flatten()
    for name in ("tokens_per_expert", "kept_per_expert"):
        assert torch.equal(getattr(got.routing, name), getattr(expected.routing, name))
    for name in ("selected", "indices"):
        assert torch.equal(getattr(got.routing, name)[flat], getattr(expected.routing, name))
        assert (getattr(got.routing, name)[~flat] == -1).all()
    for name, value in alone.state_dict().items():
        assert torch.equal(moe.state_dict()[name], value), name
    if CAPACITIES[capacity] is not None:
        assert not torch.equal(expected.routing.indices, expected.routing.selected)


@every_source
def test_only_padding_moves_nothing(fraction_from: str) -> None:
    moe = everything(fraction_from=fraction_from)
    before = copy.deepcopy(moe.state_dict())
    output = moe(torch.randn(B, S, H, dtype=F64), token_mask=torch.zeros(B, S, dtype=torch.bool))
    assert output.aux_loss == 0
    assert (output.hidden_states == 0).all()
    moe.update(output.routing)
    for name in ("router.usage", "selection_bias"):
        assert torch.equal(moe.state_dict()[name], before[name])


# --- further terms ------------------------------------------------------------------------------


def expected_terms(moe: MoE, routing: Routing, mask: Tensor | None) -> dict[str, Tensor]:
    """Each term by its function, over counted tokens that are cut out instead of masked."""
    counted = slice(None) if mask is None else mask
    logits = routing.logits[counted]
    by_score = {"score_function": moe.estimator.score_function}
    ids = routing.indices.where(routing.indices >= 0, routing.selected)
    return {
        "importance_loss": losses.importance_loss(routing.weights[counted], ids[counted], E),
        "load_loss": losses.load_loss(logits, K),
        "local_entropy_loss": losses.local_entropy_loss(logits, **by_score),
        "global_entropy_loss": losses.global_entropy_loss(logits, **by_score),
        "mutual_information_loss": losses.mutual_information_loss(logits, **by_score),
        "router_z_loss": logits.logsumexp(1).square().mean(),
    }


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("capacity", [None, Capacity(0.7), Capacity(0.7, overflow="next_best")])
def test_the_terms_by_name(score_function: str, masked: bool, capacity: Capacity | None) -> None:
    weights = [2.0**-j for j in range(len(TERMS))]
    moe = make(
        losses=list(zip(TERMS, weights, strict=True)), capacity=capacity, gate=Gate(score_function)
    )
    x = torch.randn(T, H, dtype=F64)
    mask = torch.rand(T) > 0.3 if masked else None
    output = moe(x, token_mask=mask)
    found = dict(output.routing.losses)
    aux_loss = 0.01 * found.pop("load_balancing_loss")
    expected = expected_terms(moe, output.routing, mask)
    assert_close(found, expected)
    for name, weight in zip(TERMS, weights, strict=True):
        aux_loss = aux_loss + weight * expected[name]
        assert_close(gradient_of(found[name], moe), gradient_of(expected[name], moe))
    assert_close(output.aux_loss, aux_loss)
    assert_close(gradient_of(output.aux_loss, moe), gradient_of(aux_loss, moe))


def test_importance_counts_the_slots_of_assistance() -> None:
    moe = make(losses=[("importance_loss", 1.0)], assistance=Assistance(RING))
    moe.assistance.assisted[:] = True
    routing = moe(torch.randn(T, H, dtype=F64)).routing
    totals = torch.zeros(E, dtype=F64)
    for ids, weights in zip(routing.selected, routing.weights, strict=True):
        for e, w in zip(ids.tolist(), weights.tolist(), strict=True):
            if e >= 0:
                totals[e] += w
    expected = totals.var(correction=0) / totals.mean().square()
    assert_close(routing.losses["importance_loss"].detach(), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_a_function_of_ones_own(masked: bool) -> None:
    seen: list[LossInputs] = []

    def my_term(given: LossInputs) -> Tensor:
        seen.append(given)
        return largest_logit(given)

    moe = make(
        losses=[(my_term, 0.5), ("load_loss", 0.25)],
        gate=Gate("sigmoid"),
        capacity=Capacity(0.7, overflow="next_best"),
    )
    x = torch.randn(B, S, H, dtype=F64)
    mask = torch.rand(B, S) > 0.3 if masked else None
    output = moe(x, token_mask=mask)
    routing = output.routing
    (given,) = seen
    assert given.logits is routing.logits
    assert given.weights is routing.weights
    weighed = routing.indices.where(routing.indices >= 0, routing.selected)
    assert torch.equal(given.indices, weighed)
    assert not torch.equal(weighed, routing.selected)
    assert given.token_mask is routing.token_mask
    assert given._replace(logits=0, weights=0, indices=0, token_mask=0) == (
        (0, 0, 0, 0, "sigmoid", E, K)
    )
    counted = routing.logits if mask is None else routing.logits[mask.flatten()]
    expected = counted.square().amax(1).mean()
    assert list(routing.losses) == ["load_balancing_loss", "my_term", "load_loss"]
    assert_close(routing.losses["my_term"], expected)
    assert_close(
        output.aux_loss,
        0.01 * balance(routing) + 0.5 * expected + 0.25 * routing.losses["load_loss"],
    )


def test_the_z_loss_by_either_way() -> None:
    x = torch.randn(T, H, dtype=F64)
    one, other = make(z_loss_weight=0.5), make(losses=[("router_z_loss", 0.5)])
    other.load_state_dict(one.state_dict())
    assert other.z_loss_weight == 0.5
    assert torch.equal(one(x).aux_loss, other(x).aux_loss)
    assert set(one(x).routing.losses) == set(other(x).routing.losses)
    other.z_loss_weight = 0.0
    assert set(other(x).routing.losses) == {"load_balancing_loss"}
    none = make(losses=[("router_z_loss", 0.0)])
    assert set(none(x).routing.losses) == {"load_balancing_loss"}


def test_a_function_named_like_a_term_is_not_taken_for_it() -> None:
    def router_z_loss(given: LossInputs) -> Tensor:
        return 0 * given.logits.sum() + 7

    routing = make(losses=[(router_z_loss, 0.5)])(torch.randn(T, H, dtype=F64)).routing
    assert routing.losses["router_z_loss"] == 7


def test_a_term_with_weight_zero_is_reported() -> None:
    output = make(losses=[("load_loss", 0.0)], balance_weight=0.0)(torch.randn(T, H, dtype=F64))
    assert output.aux_loss == 0
    assert output.routing.losses["load_loss"] > 0


def test_repr() -> None:
    text = repr(
        make(
            losses=[("load_loss", 0.5), (largest_logit, 0.25)],
            fraction_from="sequence",
            fraction_choices="first",
        )
    )
    assert "losses=[('load_loss', 0.5), ('largest_logit', 0.25)]" in text
    assert "fraction_from='sequence', fraction_choices='first'" in text
    for word in ("losses", "fraction"):
        assert word not in repr(make())


# --- checkpointing ------------------------------------------------------------------------------


@every_source
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(fraction_from: str, use_reentrant: bool) -> None:
    plain = everything(fraction_from=fraction_from)
    again = copy.deepcopy(plain)
    calls = []
    again.router.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(B, S, H, dtype=F64)
    mask = torch.rand(B, S) > 0.2
    seen = []
    for moe in (plain, again):

        def run(x: Tensor, moe: MoE = moe) -> Any:
            return moe(x, token_mask=mask)

        leaf = x.clone().requires_grad_()
        before = copy.deepcopy(moe.state_dict())
        torch.manual_seed(11)
        if moe is again:
            y, aux_loss, routing = checkpoint(run, leaf, use_reentrant=use_reentrant)
        else:
            y, aux_loss, routing = run(leaf)
        torch.manual_seed(12)
        (y.square().sum() + aux_loss).backward()
        assert_close(moe.state_dict(), before, rtol=0, atol=0)
        moe.update(Routing(*routing))
        seen.append(
            {"y": y, "aux_loss": aux_loss, "x": leaf.grad} | tensors_of(routing) | gradients(moe)
        )
    assert len(calls) == 2  # the recomputation did happen
    assert_close(seen[0], seen[1], rtol=0, atol=0)
    assert_close(plain.state_dict(), again.state_dict(), rtol=0, atol=0)
    for name in ("router.usage", "selection_bias", "assistance.updates_above"):
        assert not torch.equal(again.state_dict()[name], before[name])


# --- compile ------------------------------------------------------------------------------------


def check_compiled(
    moe: MoE,
    shapes: Sequence[tuple[int, ...]],
    masked: bool = True,
    options: Callable[[int], dict[str, Any]] = lambda call: {},
) -> None:
    """One compilation for all shapes, and the eager numbers, the state moving in between."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend=counter)
    for call, shape in enumerate(shapes):
        x = torch.randn(*shape, H, dtype=moe.router.weight.dtype)
        mask = torch.rand(shape) > 0.3 if masked else None
        seen = []
        for layer in (moe, compiled):
            moe.zero_grad()
            torch.manual_seed(5)
            output = layer(x, token_mask=mask, **options(call))
            (output.hidden_states.square().sum() + output.aux_loss).backward()
            seen.append(
                {"y": output.hidden_states, "aux_loss": output.aux_loss}
                | tensors_of(output.routing)
                | gradients(moe)
            )
        assert_close(seen[0], seen[1])
        moe.update(output.routing)
    assert counter.frame_count == 1


TOKENS = [(11,), (17,), (40,)]
SEQUENCES = [(3, 7), (4, 9), (11, 13)]


def test_compiles_with_fractions_of_sequences() -> None:
    check_compiled(make(fraction_from="sequence", fraction_choices="first"), SEQUENCES)


def test_compiles_with_history() -> None:
    check_compiled(make(fraction_from="history"), TOKENS, masked=False)


@pytest.mark.parametrize("fraction_from", ["batch", "global_batch"])
def test_compiles_with_earlier_counts(fraction_from: str) -> None:
    check_compiled(
        make(fraction_from=fraction_from, fraction_choices="first"),
        TOKENS,
        options=lambda call: {"earlier_counts": torch.arange(E) * call},
    )


def test_compiles_with_every_term() -> None:
    moe = make(losses=[*((name, 0.1) for name in TERMS), (largest_logit, 0.1)])
    check_compiled(moe, TOKENS)


def test_compiles_with_everything() -> None:
    check_compiled(everything(fraction_from="sequence"), SEQUENCES)


# --- life as a module ---------------------------------------------------------------------------


def by_state_dict(moe: MoE) -> MoE:
    file = io.BytesIO()
    torch.save(moe.state_dict(), file)
    file.seek(0)
    other = everything()
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda moe: pickle.loads(pickle.dumps(moe)), by_state_dict],
    ids=["deepcopy", "pickle", "state_dict"],
)
def test_copies_are_the_same_layer_and_share_nothing(copied: Callable[[MoE], MoE]) -> None:
    moe = everything()
    other = copied(moe)
    assert list(other.state_dict()) == list(moe.state_dict())
    assert repr(other) == repr(moe)
    x = torch.randn(B, S, H, dtype=F64)
    seen = []
    for layer in (moe, other):
        torch.manual_seed(3)
        output = layer(x)
        layer.update(output.routing)
        seen.append([output.hidden_states, output.aux_loss, *layer.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    for tensor in other.state_dict().values():
        tensor.fill_(1)
    for name, value in moe.state_dict().items():
        assert not torch.equal(other.state_dict()[name], value), name


def test_the_state() -> None:
    names = set(everything().state_dict())
    assert names == {
        "router.weight",
        "router.usage",
        "selection_bias",
        "assistance.assisted",
        "assistance.updates_above",
        "experts.gate_up_proj",
        "experts.down_proj",
        "shared_experts.weight",
        "shared_experts.bias",
    }


def test_meta_device_to_empty_reset_parameters() -> None:
    def fresh() -> MoE:
        return make(
            capacity=Capacity(0.9, overflow="backup", backup=RING, dynamic=True),
            assistance=Assistance(RING),
            selection_bias_rate=0.1,
            gate=Gate("sigmoid"),
            fraction_from="history",
            shared_experts=nn.Linear(H, H, dtype=F64),
            losses=[("load_loss", 0.1)],
        )

    with torch.device("meta"):
        moe = fresh()
    assert all(tensor.is_meta for tensor in (*moe.parameters(), *moe.buffers()))
    output = moe(torch.empty(B, S, H, device="meta", dtype=F64))
    assert output.routing.indices.shape == (T, K + 1)
    assert output.aux_loss.shape == ()
    moe = moe.to_empty(device="cpu")
    for tensor in (*moe.parameters(), *moe.buffers()):
        with torch.no_grad():
            tensor.fill_(1)
    other = fresh()
    for layer in (moe, other):
        torch.manual_seed(5)
        layer.reset_parameters()
    assert_close(moe.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert_close(dict(moe.named_buffers()), dict(other.named_buffers()), rtol=0, atol=0)
    assert (moe.selection_bias == 0).all()
    assert_close(moe.router.usage, torch.full((E,), 1 / E, dtype=F64))
    x = torch.randn(B, S, H, dtype=F64)
    assert torch.equal(moe(x).hidden_states, other(x).hidden_states)


def test_narrow_layers_keep_wide_state() -> None:
    moe = everything(dtype=torch.float32)
    state = copy.deepcopy(moe.state_dict())
    moe.bfloat16()
    for name in ("router.usage", "selection_bias", "assistance.updates_above"):
        assert torch.equal(moe.state_dict()[name], state[name])
    output = moe(torch.randn(B, S, H, dtype=torch.bfloat16))
    assert output.hidden_states.dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 for loss in output.routing.losses.values())
    (output.hidden_states.float().sum() + output.aux_loss).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(moe).values())


@every_source
def test_autocast(fraction_from: str) -> None:
    dtype = torch.bfloat16
    moe = everything(fraction_from=fraction_from, dtype=torch.float32)
    x = torch.randn(B, S, H)
    torch.manual_seed(1)
    plain = moe(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=dtype):
        output = moe(x)
    assert output.hidden_states.dtype == dtype
    assert torch.equal(output.aux_loss, plain.aux_loss)
    for name, tensor in tensors_of(plain.routing).items():
        assert torch.equal(tensors_of(output.routing)[name], tensor), name
    (output.hidden_states.float().square().sum() + output.aux_loss).backward()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(moe).values())


def test_any_number_of_threads_gives_the_same_bits() -> None:
    moe = everything(dtype=torch.float32, fraction_from="sequence")
    x = torch.randn(8, 250, H)
    seen = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        moe.zero_grad()
        torch.manual_seed(2)
        output = moe(x)
        output.aux_loss.backward()
        seen.append([*tensors_of(output.routing).values(), moe.router.weight.grad])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"fraction_from": "epoch"},
            ValueError,
            r'fraction_from must be one of "batch", "sequence", "global_batch", "history", '
            r'got "epoch"',
        ),
        (
            {"fraction_choices": "second"},
            ValueError,
            r'fraction_choices must be one of "all", "first", got "second"',
        ),
        (
            {"fraction_from": "history", "fraction_choices": "first"},
            ValueError,
            r'fraction_choices must be "all" with fraction_from "history", got "first"',
        ),
        (
            {"fraction_from": "history", "router": Router(H, E)},
            ValueError,
            r'router must keep usage for fraction_from "history", as Router\(track_usage=True\) '
            r"does, got one without",
        ),
        (
            {"losses": [("entropy", 0.1)]},
            ValueError,
            r'losses must be one of "router_z_loss", "importance_loss", .*, got "entropy"',
        ),
        (
            {"losses": [(3, 0.1)]},
            TypeError,
            r"losses must hold a name or a function with a __name__ in each pair, got 3",
        ),
        (
            {"losses": [(nn.Identity(), 0.1)]},
            TypeError,
            r"losses must hold a name or a function with a __name__ in each pair, got Identity\(\)",
        ),
        *[
            (
                {"losses": [("load_loss", weight)]},
                ValueError,
                rf'the weight of "load_loss" must be a finite number >= 0, got {weight}',
            )
            for weight in (-0.5, math.nan, math.inf)
        ],
        *[
            (
                options,
                ValueError,
                r"losses must name every term once, and load_balancing_loss by balance_weight, "
                rf'got "{name}"',
            )
            for name, options in (
                ("load_loss", {"losses": [("load_loss", 0.1), ("load_loss", 0.2)]}),
                ("router_z_loss", {"losses": [("router_z_loss", 0.1)], "z_loss_weight": 0.1}),
                ("largest_logit", {"losses": [(largest_logit, 0.1), (largest_logit, 0.2)]}),
            )
        ],
        (
            {"losses": [("load_balancing_loss", 0.1)]},
            ValueError,
            r'losses must be one of "router_z_loss", .*, got "load_balancing_loss"',
        ),
        (
            {"balance_weight": math.nan},
            ValueError,
            r"balance_weight must be a finite number >= 0, got nan",
        ),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^MoE: {message}$"):
        make(**options)


def test_a_function_may_not_be_called_load_balancing_loss() -> None:
    def load_balancing_loss(given: LossInputs) -> Tensor:
        return given.logits.sum()

    with pytest.raises(ValueError, match=r'^MoE: losses must name every term once, .*, got "load'):
        make(losses=[(load_balancing_loss, 0.1)])


@pytest.mark.parametrize("fraction_from", ["sequence", "history"])
def test_earlier_counts_have_no_meaning_there(fraction_from: str) -> None:
    message = (
        rf'^MoE: earlier_counts must be None with fraction_from "{fraction_from}", '
        r"got a tensor of shape \[8\]$"
    )
    with pytest.raises(ValueError, match=message):
        make(fraction_from=fraction_from)(
            torch.randn(T, H, dtype=F64), earlier_counts=torch.arange(E)
        )


@pytest.mark.parametrize(
    ("counts", "got"),
    [
        (torch.arange(E - 1), r"torch.int64 of shape \[7\]"),
        (torch.arange(1), r"torch.int64 of shape \[1\]"),
        (torch.arange(E).unsqueeze(0), r"torch.int64 of shape \[1, 8\]"),
        (torch.ones(E), r"torch.float32 of shape \[8\]"),
    ],
)
def test_earlier_counts_must_be_counts(counts: Tensor, got: str) -> None:
    message = rf"^MoE: earlier_counts must be integers \[num_experts\] = \[8\], got {got}$"
    with pytest.raises(RuntimeError, match=message):
        make()(torch.randn(T, H, dtype=F64), earlier_counts=counts)


# --- several processes --------------------------------------------------------------------------

RANKS = 2


def of_ranks(**options: Any) -> MoE:
    torch.manual_seed(0)
    return make(
        **(
            {
                "fraction_from": "global_batch",
                "balance_weight": 1.0,
                "gate": Gate("sigmoid"),
                "selection_bias_rate": 0.125,
                "assistance": Assistance(RING, threshold=1.0, lower_threshold=0.5, patience=1),
            }
            | options
        )
    )


def rank_tokens(rank: int, micro_batch: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10 * micro_batch + rank)
    x = torch.randn(T, H, generator=generator, dtype=F64)
    x[:, 0] += 3 * rank  # other experts on either rank
    return x


def seen_of(moe: MoE, run: Callable[..., Any], *args: Any, **options: Any) -> dict[str, Tensor]:
    """The balancing loss and its gradient."""
    moe.zero_grad()
    _, aux_loss, routing = run(*args, **options)
    aux_loss.backward()
    return {
        "loss": Routing(*routing).losses["load_balancing_loss"].detach(),
        "gradient": moe.router.weight.grad.clone(),
    }


def work(rank: int, folder: str) -> None:
    """One process of the group; what it saw is for the test to judge."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    try:
        x = rank_tokens(rank)
        some = torch.arange(T) % 3 != rank
        # Rank 1 has nothing but padding.
        all_or_none = torch.full((T,), rank == 0)
        groups = [dist.new_group([r]) for r in range(RANKS)]
        seen = {}
        moe = of_ranks()
        seen["plain"] = seen_of(moe, moe, x)
        first = of_ranks(fraction_choices="first")
        seen["first"] = seen_of(first, first, x)
        seen["masked"] = seen_of(moe, moe, x, token_mask=some)
        seen["empty"] = seen_of(moe, moe, x, token_mask=all_or_none)
        for use_reentrant in (True, False):
            leaf = x.clone().requires_grad_()
            seen[f"checkpointed_{use_reentrant}"] = seen_of(
                moe,
                lambda x, use_reentrant=use_reentrant: checkpoint(
                    moe, x, use_reentrant=use_reentrant
                ),
                leaf,
            )
        earlier = moe(rank_tokens(rank, 1)).routing.tokens_per_expert
        seen["earlier"] = seen_of(moe, moe, x, earlier_counts=earlier)
        compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend="aot_eager")
        seen["compiled"] = seen_of(moe, compiled, x)

        moe.eval()
        if rank == 0:  # where the other process does not evaluate
            moe(rank_tokens(1))
        seen["evaluation"] = seen_of(moe, moe, x)
        moe.train()

        alone = of_ranks(process_group=groups[rank])
        seen["alone"] = seen_of(alone, alone, x)
        copied = copy.deepcopy(alone)
        seen["copy"] = seen_of(copied, copied, x)
        alone.update(alone(x).routing)
        seen["alone_state"] = dict(alone.state_dict())
        named = of_ranks()
        named.update(named(x).routing, group=groups[rank])
        seen["named_state"] = dict(named.state_dict())
        moe.update([moe(x).routing, moe(rank_tokens(rank, 1)).routing])
        seen["state"] = dict(moe.state_dict())
        torch.save(seen, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What either of two processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def fractions_and_shares(
    moe: MoE,
    masks: Sequence[Tensor | None] = (None, None),
    columns: int = K,
    micro_batches: int = 1,
) -> tuple[Tensor, list[Tensor]]:
    """The share of all ranks' slots, and each rank's scores in its first micro-batch."""
    counts, shares = torch.zeros(E, dtype=F64), []
    for rank, mask in enumerate(masks):
        for micro_batch in range(micro_batches):
            logits = rank_tokens(rank, micro_batch) @ moe.router.weight.t()
            logits = logits if mask is None else logits[mask]
            counts = counts + counts_of(logits.topk(K).indices[:, :columns])
            if micro_batch == 0:
                shares.append(shares_of(logits, "sigmoid"))
    return counts / counts.sum(), shares


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", {}),
        ("checkpointed_True", {}),
        ("checkpointed_False", {}),
        ("compiled", {}),
        ("first", {"columns": 1}),
        ("masked", {"masks": [torch.arange(T) % 3 != rank for rank in range(RANKS)]}),
        ("earlier", {"micro_batches": 2}),
    ],
)
def test_from_the_global_batch(
    ranks: list[dict[str, Any]], name: str, options: dict[str, Any]
) -> None:
    """The fractions of all processes, and each one's own mean scores."""
    moe = of_ranks()
    fraction, shares = fractions_and_shares(moe, **options)
    for rank in range(RANKS):
        expected = plain_loss(fraction, shares[rank])
        assert_close(ranks[rank][name]["loss"], expected.detach())
        assert_close(ranks[rank][name]["gradient"], gradient_of(expected, moe))
        ids = shares[rank].topk(K).indices
        local = plain_loss(counts_of(ids) / ids.numel(), shares[rank])
        assert not torch.allclose(expected, local, rtol=1e-3)


def test_a_process_with_padding_only(ranks: list[dict[str, Any]]) -> None:
    moe = of_ranks()
    fraction, shares = fractions_and_shares(
        moe, masks=[torch.ones(T, dtype=torch.bool), torch.zeros(T, dtype=torch.bool)]
    )
    assert_close(ranks[0]["empty"]["loss"], plain_loss(fraction, shares[0]).detach())
    assert ranks[1]["empty"]["loss"] == 0
    assert (ranks[1]["empty"]["gradient"] == 0).all()


def test_averaged_over_processes_it_is_the_loss_of_the_whole(ranks: list[dict[str, Any]]) -> None:
    whole = of_ranks(fraction_from="batch")
    output = whole(torch.cat([rank_tokens(rank) for rank in range(RANKS)]))
    mean = sum(seen["plain"]["loss"] for seen in ranks) / RANKS
    assert_close(mean, balance(output.routing).detach())
    gradient = sum(seen["plain"]["gradient"] for seen in ranks) / RANKS
    assert_close(gradient, gradient_of(output.aux_loss, whole))


def test_a_process_group_of_one(ranks: list[dict[str, Any]]) -> None:
    for rank, seen in enumerate(ranks):
        moe = of_ranks(fraction_from="batch")
        output = moe(rank_tokens(rank))
        assert_close(seen["alone"]["loss"], balance(output.routing).detach())
        moe.update(output.routing)
        for name, value in moe.state_dict().items():
            assert torch.equal(seen["alone_state"][name], value), name
            assert torch.equal(seen["named_state"][name], value), name
    assert not torch.equal(
        ranks[0]["alone_state"]["selection_bias"], ranks[1]["alone_state"]["selection_bias"]
    )


def test_in_evaluation_no_process_waits_for_another(ranks: list[dict[str, Any]]) -> None:
    """What each of them evaluates is its own affair, and so is its batch."""
    for rank, seen in enumerate(ranks):
        moe = of_ranks(fraction_from="batch").eval()
        expected = balance(moe(rank_tokens(rank)).routing)
        assert_close(seen["evaluation"]["loss"], expected.detach())
        assert_close(seen["evaluation"]["gradient"], gradient_of(expected, moe))


def test_all_processes_move_alike(ranks: list[dict[str, Any]]) -> None:
    moe = of_ranks(fraction_from="batch")
    parts = [moe(rank_tokens(rank, part)).routing for rank in range(RANKS) for part in range(2)]
    moe.update(parts)
    assert moe.assistance.assisted.any()
    counts = sum(routing.tokens_per_expert for routing in parts)
    expected = update_selection_bias(torch.zeros(E, dtype=F64), counts, 0.125)
    assert torch.equal(moe.selection_bias, expected)
    for seen in ranks:
        for name, value in moe.state_dict().items():
            assert torch.equal(seen["state"][name], value), name


def test_a_copy_has_the_same_process_group(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert_close(seen["copy"], seen["alone"], rtol=0, atol=0)


def test_pairs_and_functions_that_are_no_terms() -> None:
    for bad in ("importance_loss", ("importance_loss",)):
        with pytest.raises(TypeError, match=r"^MoE: losses must be pairs of a term .*, got"):
            make(losses=[bad])
    message = r'^MoE: losses must have "importance_loss" for that function, .*, got the function'
    with pytest.raises(TypeError, match=message):
        make(losses=[(losses.importance_loss, 0.1)])
