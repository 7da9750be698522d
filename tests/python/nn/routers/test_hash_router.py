"""Experts by a fixed hash: its values for good, how even and independent it is, in a layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from torchmoe.losses import LOSSES
from torchmoe.nn import Balance, Gate, HashRouter, MoE

H, INNER, E, K, T = 6, 7, 5, 2, 23
F64 = torch.float64
MANY = 10_000


def make(num_experts: int = E, top_k: int = K, seed: int = 0, **options: Any) -> MoE:
    router = HashRouter(num_experts, top_k, seed=seed)
    return MoE(H, INNER, num_experts, top_k, router=router, **options)


def chosen(router: HashRouter, ids: Tensor) -> Tensor:
    """[T, K], the experts with logit 0 in ascending order."""
    return router(ids).topk(router.top_k, dim=1).indices.sort(dim=1).values


def mixed(number: int) -> int:
    """Splitmix64's output function, on unsigned numbers."""
    modulus = 2**64
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % modulus
    number = (number ^ number >> 27) * 0x94D049BB133111EB % modulus
    return number ^ number >> 31


def plain_choice(token_id: int, num_experts: int, top_k: int, seed: int) -> list[int]:
    step, modulus = 0x9E3779B97F4A7C15, 2**64
    numbers = []
    for expert in range(num_experts):
        salt = mixed((seed * num_experts + expert) * step % modulus)
        number = mixed(token_id * step % modulus ^ salt)
        numbers.append(number - modulus if number >= modulus // 2 else number)
    return sorted(sorted(range(num_experts), key=lambda e: -numbers[e])[:top_k])


def statistic(counts: Tensor, expected: Tensor | float) -> float:
    """Chi square."""
    return float(((counts - expected).square() / expected).sum())


def test_the_choice_never_changes() -> None:
    # Whoever trained a model with it has these experts.
    ids = torch.tensor([0, 1, 2, 50256, -1, 2**40, -(2**63), 2**63 - 1])
    pairs = [[1, 3], [2, 7], [0, 2], [0, 3], [0, 5], [1, 2], [5, 6], [2, 4]]
    assert chosen(HashRouter(8, 2), ids).tolist() == pairs
    assert chosen(HashRouter(64, seed=3), ids).flatten().tolist() == [49, 54, 53, 24, 22, 1, 24, 22]


@pytest.mark.parametrize("seed", [0, 1, -1, 12345, 2**62, -(2**70)])
def test_the_choice_is_that_of_plain_integers(seed: int) -> None:
    ids = torch.cat([torch.arange(-20, 20), torch.randint(-(2**63), 2**63 - 1, (20,))])
    expected = [plain_choice(token_id, E, K, seed) for token_id in ids.tolist()]
    assert chosen(HashRouter(E, K, seed=seed), ids).tolist() == expected


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (5, 1), (5, 3), (5, 5), (64, 8)])
def test_every_token_has_top_k_distinct_experts(num_experts: int, top_k: int) -> None:
    router = HashRouter(num_experts, top_k)
    logits = router(torch.arange(T))
    assert ((logits == 0).sum(dim=1) == top_k).all()
    assert ((logits == 0) | (logits == -1e4)).all()
    moe = make(num_experts, top_k)
    routing = moe(torch.randn(T, H), router_input=torch.arange(T)).routing
    ids = routing.selected.sort(dim=1).values
    assert torch.equal(ids, chosen(router, torch.arange(T)))
    assert (ids.diff(dim=1) > 0).all()


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("kind", ["consecutive", "random", "multiples"])
def test_loads_are_even(kind: str, seed: int, top_k: int) -> None:
    num_experts = 16
    ids = {
        "consecutive": torch.arange(MANY),
        "random": torch.randint(-(2**63), 2**63 - 1, (MANY,)),
        "multiples": torch.arange(MANY) * 2**20,
    }[kind]
    counts = torch.bincount(chosen(HashRouter(num_experts, top_k, seed=seed), ids).flatten())
    # 15 degrees of freedom; 60 is exceeded by chance with probability 2e-7, and choosing without
    # replacement only makes the counts more even.
    assert statistic(counts, top_k * MANY / num_experts) < 60
    assert counts.numel() == num_experts


def test_pairs_of_experts_are_even() -> None:
    num_experts = 6
    pairs = chosen(HashRouter(num_experts, 2), torch.arange(MANY))
    counts = torch.bincount(pairs[:, 0] * num_experts + pairs[:, 1])
    counts = counts[counts > 0]
    assert counts.numel() == 15
    assert statistic(counts, MANY / 15) < 58  # 14 degrees of freedom, probability 3e-7


@pytest.mark.parametrize("seeds", [(0, 1), (0, -1), (1, 2), (3, 1000)])
def test_two_seeds_are_independent(seeds: tuple[int, int]) -> None:
    one, two = (chosen(HashRouter(8, seed=seed), torch.arange(MANY)).squeeze(1) for seed in seeds)
    joint = torch.bincount(one * 8 + two, minlength=64)
    assert statistic(joint, MANY / 64) < 135  # 63 degrees of freedom, probability 3e-7
    assert 0.1 < (one == two).double().mean() < 0.15


def test_neighbouring_ids_are_independent() -> None:
    experts = chosen(HashRouter(8), torch.arange(MANY)).squeeze(1)
    joint = torch.bincount(experts[:-1] * 8 + experts[1:], minlength=64)
    assert statistic(joint, (MANY - 1) / 64) < 135


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.uint16])
def test_any_integers(dtype: torch.dtype) -> None:
    ids = torch.arange(200)
    assert torch.equal(HashRouter(E, K)(ids.to(dtype)), HashRouter(E, K)(ids))
    if dtype.is_signed:
        assert torch.equal(HashRouter(E, K)((-ids).to(dtype)), HashRouter(E, K)(-ids))
    assert not torch.equal(HashRouter(E, K)(-ids), HashRouter(E, K)(ids))


def test_logits_are_float32_whatever_the_default() -> None:
    before = torch.get_default_dtype()
    try:
        for default in (torch.float64, torch.bfloat16, torch.float32):
            torch.set_default_dtype(default)
            assert HashRouter(E, K)(torch.arange(3)).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("normalize", [None, "none", "topk", "uniform"])
@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_every_weight_is_the_same(top_k: int, normalize: str | None) -> None:
    # The exact gradient of constant weights is refused, as there is nothing to learn.
    gate = Gate(normalize=normalize, estimator="straight_through")
    moe = make(7, top_k, gate=gate)
    weights = moe(torch.randn(T, H), router_input=torch.arange(T)).routing.weights
    assert torch.equal(weights, torch.full((T, top_k), 1 / top_k))


def test_output_is_the_mean_of_the_experts() -> None:
    moe = make(dtype=F64)
    x, ids = torch.randn(T, H, dtype=F64), torch.randint(0, 1000, (T,))
    experts = torch.tensor([plain_choice(token_id, E, K, 0) for token_id in ids.tolist()])
    expected = moe.experts(x, experts, torch.full((T, K), 1 / K, dtype=F64))
    assert_close(moe(x, router_input=ids).hidden_states, expected)


def test_there_is_nothing_to_learn() -> None:
    moe = make()
    assert not list(moe.router.parameters())
    assert not moe.router.state_dict()
    output = moe(torch.randn(T, H), router_input=torch.arange(T))
    assert not output.routing.logits.requires_grad
    assert not output.aux_loss.requires_grad
    (output.hidden_states.sum() + output.aux_loss).backward()
    moe.reset_parameters()
    moe.update(output.routing)


@pytest.mark.parametrize("token_mask", [False, True])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_is_a_number(name: str, score_function: str, token_mask: bool) -> None:
    moe = make(gate=Gate(score_function), balance=Balance(losses=[(name, 0.1)]))
    x = torch.randn(T, H, requires_grad=True)
    mask = torch.arange(T) % 3 > 0 if token_mask else None
    output = moe(x, router_input=torch.arange(T), token_mask=mask)
    assert all(loss.isfinite() for loss in output.routing.losses.values())
    (output.hidden_states.sum() + output.aux_loss).backward()
    assert x.grad.isfinite().all()
    if name == "router_z_loss":
        expected = torch.tensor(math.log(K) ** 2)
        assert_close(output.routing.losses[name], expected)


def test_the_balancing_loss_is_that_of_the_counts() -> None:
    # Every mean score is the share of the slots itself.
    routing = make(dtype=F64)(torch.randn(T, H, dtype=F64), router_input=torch.arange(T)).routing
    shares = routing.tokens_per_expert.float() / (K * T)
    assert_close(routing.losses["load_balancing_loss"], E * shares.square().sum())


def test_masks() -> None:
    moe = make()
    x = torch.randn(3, T, H)
    ids = torch.randint(0, 1000, (3, T))
    mask = torch.rand(3, T) > 0.3
    routing = moe(x, router_input=ids, token_mask=mask).routing
    other = moe(x, router_input=ids.where(mask, 77), token_mask=mask).routing
    assert torch.equal(routing.selected, other.selected)
    assert (routing.selected[~mask.flatten()] == -1).all()
    expected = chosen(moe.router, ids[mask])
    assert torch.equal(routing.selected[mask.flatten()].sort(dim=1).values, expected)
    assert torch.equal(routing.tokens_per_expert, torch.bincount(expected.flatten(), minlength=E))


def test_errors() -> None:
    x = torch.randn(T, H)
    message = (
        r"HashRouter: router_input must be token ids, integers with x's leading dimensions, "
        rf"got torch.float32 of shape \[{T}, {H}\]"
    )
    with pytest.raises(RuntimeError, match=message):
        make()(x)
    with pytest.raises(RuntimeError, match=r"got torch.int64 of shape \[23, 2\]"):
        make()(x, router_input=torch.zeros(T, 2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"got torch.complex64 of shape \[3\]"):
        HashRouter(E)(torch.zeros(3, dtype=torch.complex64))
    for options, error, text in (
        ({"num_experts": 0}, ValueError, r"HashRouter: num_experts must be >= 1, got 0"),
        ({"top_k": 0}, ValueError, r"HashRouter: top_k must be in \[1, 5\], got 0"),
        ({"top_k": 6}, ValueError, r"HashRouter: top_k must be in \[1, 5\], got 6"),
        ({"top_k": 1.0}, TypeError, r"HashRouter: top_k must be an int, got 1.0"),
        ({"seed": "a"}, TypeError, r"HashRouter: seed must be an int, got 'a'"),
    ):
        with pytest.raises(error, match=text):
            HashRouter(**({"num_experts": E} | options))


def test_extra_repr() -> None:
    assert HashRouter(E, K, seed=3).extra_repr() == "num_experts=5, top_k=2, seed=3"
