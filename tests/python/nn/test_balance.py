"""Balancing losses of the layer: where the fractions come from, further terms, and what holds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from balanced import (
    F64,
    RING,
    TERMS,
    B,
    E,
    H,
    K,
    S,
    T,
    balance,
    counts_of,
    gradient_of,
    largest_logit,
    make,
    plain_loss,
    shares_of,
)
from copies import by_pickle, load_state
from op_case import tolerance
from plain_moe import gradients, tensors_of
from torchmoe import ops
from torchmoe.nn import Assistance, Balance, Capacity, Gate, MoE, Router, Routing, WithAttachedLoss

FROM = ("batch", "sequence", "global_batch", "history")
every_source = pytest.mark.parametrize("fraction_from", FROM)

pytestmark = pytest.mark.usefixtures("one_thread")


ALL_TERMS = Balance(
    weight=0.5,
    z_loss_weight=0.25,
    losses=[*((name, 0.125) for name in TERMS[:-1]), (largest_logit, 0.0625)],
    fraction_from="history",
    selection_bias_rate=0.125,
    selection_bias_centred=True,
)


def everything(**options: Any) -> MoE:
    """A layer with all that concerns balance at once, in a state that is not the first one."""
    given: dict[str, Any] = {
        "gate": Gate("sigmoid", num_groups=4, top_groups=2),
        "capacity": Capacity(
            0.9, overflow="backup", backup=RING, dynamic=True, priority="random", minimum=1
        ),
        "assistance": Assistance(RING, threshold=1.0, lower_threshold=0.5, patience=2),
        "balance": ALL_TERMS,
        "shared_experts": nn.Linear(H, H, dtype=options.get("dtype", F64)),
        "routed_scaling_factor": 2.5,
    } | options
    moe = make(**given)
    for _ in range(3):
        moe.update(moe(torch.randn(T, H, dtype=moe.router.weight.dtype)).routing)
    if moe.assistance is not None:
        assert moe.assistance.assisted.any()
    return moe


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
        {"balance": Balance(weight=1.0, fraction_from="sequence")},
        {"balance": Balance(weight=1.0, fraction_from="sequence", fraction_choices="first")},
        {"balance": Balance(weight=1.0, fraction_from="history")},
        {"balance": Balance(0, z_loss_weight=1.0)},
        {"balance": Balance(0, losses=[("router_z_loss", 1.0)])},
        {"balance": Balance(0, losses=[("local_entropy_loss", 1.0)])},
        {"balance": Balance(weight=1.0, fraction_from="history"), "gate": Gate("sigmoid")},
    ],
    ids=["sequence", "first", "history", "z", "z_by_name", "local_entropy", "sigmoid"],
)
def test_eight_micro_batches_are_one_batch(options: dict[str, Any]) -> None:
    """Exactly, where the term is a mean over tokens or sequences of what each of them gives."""
    moe = make(**options)
    if moe.router.usage is not None:
        moe.router.usage.copy_(torch.arange(E) / 28)
    assert not differ(moe)


@pytest.mark.parametrize(
    "options",
    [
        {"balance": Balance(weight=1.0)},
        {"balance": Balance(weight=1.0, fraction_from="global_batch")},
        *[
            {"balance": Balance(0, losses=[(name, 1.0)])}
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
    assert differ(make(**options))


def test_eight_micro_batches_move_the_state_as_one_batch() -> None:
    options = {
        "balance": Balance(selection_bias_rate=0.01),
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
    moe = everything(
        balance=replace(ALL_TERMS, fraction_from=fraction_from), capacity=CAPACITIES[capacity]
    )
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
    moe = everything(balance=replace(ALL_TERMS, fraction_from=fraction_from))
    before = copy.deepcopy(moe.state_dict())
    output = moe(torch.randn(B, S, H, dtype=F64), token_mask=torch.zeros(B, S, dtype=torch.bool))
    assert output.aux_loss == 0
    assert (output.hidden_states == 0).all()
    moe.update(output.routing)
    for name in ("router.usage", "selection_bias"):
        assert torch.equal(moe.state_dict()[name], before[name])


def test_repr() -> None:
    text = repr(
        make(
            balance=Balance(
                losses=[("load_loss", 0.5), (largest_logit, 0.25)],
                fraction_from="sequence",
                fraction_choices="first",
            ),
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
    plain = everything(balance=replace(ALL_TERMS, fraction_from=fraction_from))
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
    check_compiled(
        make(balance=Balance(fraction_from="sequence", fraction_choices="first")), SEQUENCES
    )


def test_compiles_with_history() -> None:
    check_compiled(make(balance=Balance(fraction_from="history")), TOKENS, masked=False)


@pytest.mark.parametrize("fraction_from", ["batch", "global_batch"])
def test_compiles_with_earlier_counts(fraction_from: str) -> None:
    check_compiled(
        make(balance=Balance(fraction_from=fraction_from, fraction_choices="first")),
        TOKENS,
        options=lambda call: {"earlier_counts": torch.arange(E) * call},
    )


def test_compiles_with_every_term() -> None:
    moe = make(balance=Balance(losses=[*((name, 0.1) for name in TERMS), (largest_logit, 0.1)]))
    check_compiled(moe, TOKENS)


def test_compiles_with_everything() -> None:
    check_compiled(everything(balance=replace(ALL_TERMS, fraction_from="sequence")), SEQUENCES)


# --- life as a module ---------------------------------------------------------------------------


def by_state_dict(moe: MoE) -> MoE:
    return load_state(everything(), moe)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, by_pickle, by_state_dict],
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
            balance=Balance(
                losses=[("load_loss", 0.1)], fraction_from="history", selection_bias_rate=0.1
            ),
            gate=Gate("sigmoid"),
            shared_experts=nn.Linear(H, H, dtype=F64),
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
    moe = everything(balance=replace(ALL_TERMS, fraction_from=fraction_from), dtype=torch.float32)
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
    moe = everything(dtype=torch.float32, balance=replace(ALL_TERMS, fraction_from="sequence"))
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
                r"losses must name every term once, router_z_loss here or by "
                r"z_loss_weight, and load_balancing_loss by weight, "
                rf'got "{name}"',
            )
            for name, options in (
                (
                    "load_loss",
                    {"losses": [("load_loss", 0.1), ("load_loss", 0.2)]},
                ),
                (
                    "router_z_loss",
                    {"z_loss_weight": 0.1, "losses": [("router_z_loss", 0.1)]},
                ),
                (
                    "largest_logit",
                    {"losses": [(largest_logit, 0.1), (largest_logit, 0.2)]},
                ),
            )
        ],
        (
            {"losses": [("load_balancing_loss", 0.1)]},
            ValueError,
            r'losses must be one of "router_z_loss", .*, got "load_balancing_loss"',
        ),
        (
            {"weight": math.nan},
            ValueError,
            r"weight must be a finite number >= 0, got nan",
        ),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^Balance: {message}$"):
        Balance(**options)


def test_a_history_needs_a_router_that_keeps_one() -> None:
    message = (
        r'^MoE: router must keep usage for balance.fraction_from "history", as '
        r"Router\(track_usage=True\) does, got Router without$"
    )
    with pytest.raises(ValueError, match=message):
        make(balance=Balance(fraction_from="history"), router=Router(H, E))
    moe = make()
    with pytest.raises(ValueError, match=message):
        moe.balance = Balance(fraction_from="history")
    assert moe.balance == Balance()


@pytest.mark.parametrize("fraction_from", ["sequence", "history"])
def test_earlier_counts_have_no_meaning_there(fraction_from: str) -> None:
    message = (
        rf'^MoE: earlier_counts must be None with fraction_from "{fraction_from}", '
        r"got a tensor of torch.int64 of shape \[8\]$"
    )
    with pytest.raises(ValueError, match=message):
        make(balance=Balance(fraction_from=fraction_from))(
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
