"""Balancing under padding, checkpointing, compilation and whatever moves modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from balance_layers import ALL_TERMS, every_source, everything
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
    largest_logit,
    make,
)
from copies import by_pickle, load_state
from plain_moe import gradients, tensors_of
from torchmoe.nn import Assistance, Balance, Capacity, Gate, MoE, Routing

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
    """One compilation for all shapes, and the eager values, the state moving in between."""
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
