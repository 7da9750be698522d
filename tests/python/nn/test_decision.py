"""A layer that is given the decision of another pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from plain_moe import gradients, tensors_of
from replayed import INNER, E, H, K, T, random_layer, same
from torchmoe.nn import (
    Capacity,
    Decision,
    ExpertChoiceRouter,
    Gate,
    MoE,
    Router,
    SparseMixer,
)


def test_the_auxiliary_loss_is_that_of_the_forced_choice() -> None:
    moe = random_layer()
    x = torch.randn(T, H)
    first = moe(x)
    again = moe(x, decision=first.routing.decision)
    assert torch.equal(first.aux_loss, again.aux_loss)
    other = moe(x)
    assert not torch.equal(first.routing.tokens_per_expert, other.routing.tokens_per_expert)
    assert not torch.equal(first.aux_loss, other.aux_loss)


def test_sparsemixers_factor_is_drawn_anew() -> None:
    moe = MoE(H, INNER, E, K, gate=Gate(estimator=SparseMixer(jitter=1.0)))
    x = torch.randn(T, H)
    first = moe(x).routing
    forced = moe(x, decision=first.decision).routing
    assert same(first.decision, forced.decision)
    assert not torch.equal(first.weights, forced.weights)
    moe.eval()
    assert torch.equal(*(moe(x, decision=first.decision).routing.weights for _ in range(2)))


@pytest.mark.parametrize("normalize", ["none", "topk"])
def test_the_choice_of_experts_is_forced_where_tokens_choose(normalize: str) -> None:
    experts_choose = MoE(H, INNER, E, K, router=ExpertChoiceRouter(Router(H, E), K))
    tokens_choose = MoE(H, INNER, E, K, gate=Gate(normalize=normalize), capacity=Capacity(0.5))
    x = torch.randn(T, H)
    decision = experts_choose(x).routing.decision
    assert decision.selected.shape == (T, E)
    output = tokens_choose(x, decision=decision)
    assert same(output.routing.decision, decision)
    routed = decision.indices >= 0
    probs = output.routing.logits.softmax(dim=1).gather(1, decision.indices.clamp(min=0)) * routed
    if normalize == "topk":
        total = probs.sum(dim=1, keepdim=True)
        probs = probs / total.where(total > 0, 1)
    assert_close(output.routing.weights * routed, probs)
    counts = torch.stack([(decision.indices == expert).sum() for expert in range(E)])
    assert torch.equal(output.routing.tokens_per_expert, counts)
    output.hidden_states.sum().backward()
    gradients(tokens_choose)


def test_a_layer_without_rerouting_weighs_rerouted_slots_by_their_experts() -> None:
    one = MoE(H, INNER, E, K, capacity=Capacity(0.8, overflow="next_best"))
    other = MoE(H, INNER, E, K)
    x = torch.randn(T, H)
    decision = one(x).routing.decision
    assert ((decision.selected != decision.indices) & (decision.indices >= 0)).any()
    routing = other(x, decision=decision).routing
    rows = (decision.indices >= 0).all(dim=1)
    chosen = routing.logits.gather(1, decision.indices.clamp(min=0)).softmax(dim=1)
    assert_close(routing.weights[rows], chosen[rows])


def test_assistance_counts_nothing_of_its_own_in_a_forced_pass_either() -> None:
    moe = random_layer()
    x = torch.randn(T, H)
    decision = moe(x).routing.decision
    assert decision.selected.shape == (T, K + 1)
    routing = moe(x, decision=decision).routing
    assert routing.tokens_per_expert.sum() == T * K
    assert torch.equal(routing.kept_per_expert.sum(), (decision.indices >= 0).sum())


def test_a_masked_token_stays_unrouted() -> None:
    moe = random_layer()
    x = torch.randn(2, T, H)
    mask = torch.rand(2, T) < 0.6
    decision = moe(x).routing.decision
    output = moe(x.masked_fill(~mask[..., None], torch.nan), token_mask=mask, decision=decision)
    assert (output.hidden_states[~mask] == 0).all()
    flat = mask.flatten()
    for forced, given in zip(output.routing.decision, decision, strict=True):
        assert (forced[~flat] == -1).all()
        assert torch.equal(forced[flat], given[flat])
    assert output.routing.tokens_per_expert.sum() == K * flat.sum()
    # And a decision that was taken under a mask has nothing for masked tokens.
    again = moe(x, decision=output.routing.decision)
    assert (again.hidden_states[~mask] == 0).all()
    assert again.hidden_states.isfinite().all()


def test_no_tokens() -> None:
    moe = random_layer()
    decision = moe(torch.randn(0, H)).routing.decision
    assert moe(torch.randn(0, H), decision=decision).hidden_states.shape == (0, H)


def test_a_decision_without_the_column_of_assistance() -> None:
    plain, assisted = MoE(H, INNER, E, K), random_layer()
    x = torch.randn(T, H)
    message = rf"\[num_tokens, top_k \+ 1 with assistance\] = \[{T}, {K + 1}\], .* \[{T}, {K}\]"
    with pytest.raises(RuntimeError, match=message):
        assisted(x, decision=plain(x).routing.decision)


@pytest.mark.parametrize("decision", [5, ([[0]], [[1]]), "ids"])
def test_a_decision_must_be_one(decision: Any) -> None:
    moe = MoE(H, INNER, E, K)
    with pytest.raises(TypeError, match=r"MoE: decision must be a Decision, .*, got (int|tup|str)"):
        moe(torch.randn(T, H), decision=decision)


def test_compile_once_with_a_decision() -> None:
    moe = random_layer()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (11, 17, 40):
        x = torch.randn(num_tokens, H)
        decision = moe(x).routing.decision
        seen = []
        for layer in (moe, compiled):
            moe.zero_grad()
            output = layer(x, decision=decision)
            (output.hidden_states.square().sum() + output.aux_loss).backward()
            assert same(output.routing.decision, decision)
            seen.append({"y": output.hidden_states} | tensors_of(output.routing) | gradients(moe))
        assert_close(seen[0], seen[1])
    assert counter.frame_count == 1


def test_a_bad_decision() -> None:
    moe = MoE(H, INNER, E, K)
    x = torch.randn(T, H)
    good = moe(x).routing.decision
    for decision, message in (
        (good._replace(selected=good.selected.int()), "selected must be int64 .* got torch.int32"),
        (good._replace(indices=good.indices.float()), "indices must be int64 .* got torch.float32"),
        (
            good._replace(indices=good.indices[:, :1]),
            rf"indices must be .* = \[{T}, {K}\], got torch.int64 of shape \[{T}, 1\]",
        ),
        (Decision(*(one[0] for one in good)), rf"selected must be .* of shape \[{K}\]"),
        (Decision(*(one.sum() for one in good)), r"selected must be .* of shape \[\]"),
    ):
        with pytest.raises(RuntimeError, match=f"MoE: decision.{message}"):
            moe(x, decision=decision)
    with pytest.raises(
        TypeError,
        match=r"^MoE: decision must be a Decision, such as moe\(x\)\.routing\.decision, "
        "got Routing$",
    ):
        moe(x, decision=moe(x).routing)
