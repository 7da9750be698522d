"""Further terms of a layer's auxiliary loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

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
    gradient_of,
    largest_logit,
    make,
)
from torchmoe import losses
from torchmoe.losses import LossInputs
from torchmoe.nn import Assistance, Balance, Capacity, Gate, MoE, Routing

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
        balance=Balance(losses=list(zip(TERMS, weights, strict=True))),
        capacity=capacity,
        gate=Gate(score_function),
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
    moe = make(balance=Balance(losses=[("importance_loss", 1.0)]), assistance=Assistance(RING))
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
        balance=Balance(losses=[(my_term, 0.5), ("load_loss", 0.25)]),
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
    assert given.clean_logits is given.logits
    assert given._replace(logits=0, weights=0, indices=0, token_mask=0, clean_logits=0) == (
        (0, 0, 0, 0, "sigmoid", E, K, 0, None)
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
    one, other = (
        make(balance=Balance(z_loss_weight=0.5)),
        make(balance=Balance(losses=[("router_z_loss", 0.5)])),
    )
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x).aux_loss, other(x).aux_loss)
    assert set(one(x).routing.losses) == set(other(x).routing.losses)
    other.balance = replace(other.balance, losses=())
    assert set(other(x).routing.losses) == {"load_balancing_loss"}
    none = make(balance=Balance(losses=[("router_z_loss", 0.0)]))
    assert set(none(x).routing.losses) == {"load_balancing_loss"}


def test_a_function_named_like_a_term_is_not_taken_for_it() -> None:
    def router_z_loss(given: LossInputs) -> Tensor:
        return 0 * given.logits.sum() + 7

    routing = make(balance=Balance(losses=[(router_z_loss, 0.5)]))(
        torch.randn(T, H, dtype=F64)
    ).routing
    assert routing.losses["router_z_loss"] == 7


def test_a_term_with_weight_zero_is_reported() -> None:
    output = make(balance=Balance(weight=0.0, losses=[("load_loss", 0.0)]))(
        torch.randn(T, H, dtype=F64)
    )
    assert output.aux_loss == 0
    assert output.routing.losses["load_loss"] > 0


def test_a_function_may_not_be_called_load_balancing_loss() -> None:
    def load_balancing_loss(given: LossInputs) -> Tensor:
        return given.logits.sum()

    with pytest.raises(
        ValueError, match=r'^Balance: losses must name every term once, .*, got "load'
    ):
        make(balance=Balance(losses=[(load_balancing_loss, 0.1)]))


def test_pairs_and_functions_that_are_no_terms() -> None:
    for bad in ("importance_loss", ("importance_loss",)):
        with pytest.raises(TypeError, match=r"^Balance: losses must be pairs of a term .*, got"):
            make(balance=Balance(losses=[bad]))
    message = (
        r'^Balance: losses must have "importance_loss" for that function, .*, got the function'
    )
    with pytest.raises(TypeError, match=message):
        make(balance=Balance(losses=[(losses.importance_loss, 0.1)]))
