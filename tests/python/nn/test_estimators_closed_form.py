"""Each estimator against its formula, written out by hand for experts that are matrices.

With E_i(x) = A_i x and L = sum_t <V_t, y_t> everything has a closed form, token by token: G_i =
<V, A_i x>, dL/dA_i = c_i V x^T with c_i the coefficient of expert i, and dL/dz = p (dL/dp - <p,
dL/dp>) for the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchmoe.nn import (
    Balance,
    Capacity,
    DefaultVector,
    Estimator,
    ExpertList,
    Gate,
    GumbelStraightThrough,
    MoE,
    MoEOutput,
    SparseMixer,
)

H, E, K, T = 4, 5, 2, 40
F64 = torch.float64


@dataclass
class Token:
    """One token: what the layer saw and chose."""

    z: Tensor  # logits [E]
    outputs: Tensor  # A_i x [E, H]
    v: Tensor  # dL/dy [H]
    selected: list[int]
    ids: list[int]  # those of `selected` that were not dropped
    weights: Tensor  # [K]

    @property
    def g(self) -> Tensor:
        """G [E]."""
        return self.outputs @ self.v


# The coefficients c [E] of the experts' outputs, dL/dlogits [E], and what else is in y [H].
Formula = Callable[[Token], tuple[Tensor, Tensor, Tensor | float]]


def zeros() -> Tensor:
    return torch.zeros(E, dtype=F64)


def through_softmax(p: Tensor, grad_p: Tensor) -> Tensor:
    return p * (grad_p - (p * grad_p).sum())


def exact(token: Token) -> Any:
    p, ids = token.z.softmax(0), token.ids
    c, grad_p = zeros(), zeros()
    c[ids] = p[ids] / p[ids].sum()
    grad_p[ids] = (token.g[ids] - (c * token.g).sum()) / p[ids].sum()
    return c, through_softmax(p, grad_p), 0.0


def straight_through(token: Token) -> Any:
    p, ids = token.z.softmax(0), token.ids
    c, grad_p = zeros(), zeros()
    c[ids] = p[ids] / p[ids].sum()
    grad_p[ids] = token.g[ids]
    return c, through_softmax(p, grad_p), 0.0


def straight_through_dense(token: Token) -> Any:
    p, ids = token.z.softmax(0), token.ids
    c = zeros()
    c[ids] = p[ids] / p[ids].sum()
    return c, through_softmax(p, token.g), 0.0


def default_vector(d: Tensor) -> Formula:
    def formula(token: Token) -> Any:
        p = token.z.softmax(0)
        c, grad_p, rest = zeros(), d @ token.v, p @ d
        for i in token.ids:
            c[i], grad_p[i], rest = p[i], token.g[i], rest - p[i] * d[i]
        return c, through_softmax(p, grad_p), rest

    return formula


def competition(z: Tensor, taken: list[int], jitter: float) -> Tensor:
    """The probabilities q [E] of a slot of sparsemixer."""
    left = [i for i in range(E) if i not in taken]
    most = max(float(z[i]) for i in left)
    near = [i for i in left if (most - float(z[i])) / max(abs(float(z[i])), most) <= 2 * jitter]
    q = zeros()
    q[near] = z[near].softmax(0)
    return q


def sparsemixer(jitter: float) -> Formula:
    def formula(token: Token) -> Any:
        c, grad_z = zeros(), zeros()
        for j, i in enumerate(token.selected):
            q = competition(token.z, token.selected[:j], jitter)
            factors = [1.0] if i == int(q.argmax()) else [1.0, 1 / 3]
            assert min(abs(float(token.weights[j] - q[i] * factor)) for factor in factors) < 1e-12
            if i in token.ids:
                c[i] = token.weights[j]
                grad_z += token.g[i] * q[i] * (torch.eye(E, dtype=F64)[i] - q)
        return c, grad_z, 0.0

    return formula


def layer(estimator: str | Estimator, **options: Any) -> MoE:
    """Experts that are matrices; logits of order one."""
    experts = ExpertList(nn.Linear(H, H, bias=False, dtype=F64) for _ in range(E))
    gate = Gate(estimator=estimator)
    moe = MoE(
        H, None, E, K, gate=gate, experts=experts, balance=Balance(weight=0.0), dtype=F64, **options
    )
    nn.init.normal_(moe.router.weight)
    return moe


def check(moe: MoE, formula: Formula) -> MoEOutput:
    """Compares y and every gradient with the formula, summed over the tokens."""

    def close(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=1e-12)

    x = torch.randn(T, H, dtype=F64, requires_grad=True)
    direction = torch.randn(T, H, dtype=F64)
    output = moe(x)
    (output.hidden_states * direction).sum().backward()
    router = moe.router.weight.detach()
    matrices = [expert.weight.detach() for expert in moe.experts.experts]
    grad_router = torch.zeros(E, H, dtype=F64)
    grad_matrices = torch.zeros(E, H, H, dtype=F64)
    for t, (x_t, v) in enumerate(zip(x.detach(), direction, strict=True)):
        token = Token(
            z=router @ x_t,
            outputs=torch.stack([a @ x_t for a in matrices]),
            v=v,
            selected=output.routing.selected[t].tolist(),
            ids=[i for i in output.routing.indices[t].tolist() if i >= 0],
            weights=output.routing.weights[t].detach(),
        )
        c, grad_z, rest = formula(token)
        close(output.hidden_states[t], c @ token.outputs + rest)
        close(x.grad[t], router.T @ grad_z + sum(c[i] * matrices[i].T @ v for i in range(E)))
        grad_router += torch.outer(grad_z, x_t)
        grad_matrices += c[:, None, None] * torch.outer(v, x_t)
    close(moe.router.weight.grad, grad_router)
    close(torch.stack([expert.weight.grad for expert in moe.experts.experts]), grad_matrices)
    return output


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("exact", exact),
        ("straight_through", straight_through),
        ("straight_through_dense", straight_through_dense),
        ("gumbel_straight_through", straight_through),
    ],
)
def test_given_the_choice(name: str, formula: Formula) -> None:
    check(layer(name), formula)


@pytest.mark.parametrize(
    ("name", "formula"),
    [("straight_through", straight_through), ("straight_through_dense", straight_through_dense)],
)
def test_a_dropped_slot(name: str, formula: Formula) -> None:
    """Normalised over the survivors; every expert still counts for straight_through_dense."""
    output = check(layer(name, capacity=Capacity(0.6, normalize="after_drop")), formula)
    assert (output.routing.indices < 0).any()


# --- default_vector


@pytest.mark.parametrize("capacity", [None, Capacity(0.7)])
def test_default_vector(capacity: Capacity | None) -> None:
    moe = layer("default_vector", capacity=capacity)
    d = torch.randn(E, H, dtype=F64)
    moe.estimator.default_vectors.copy_(d)
    output = check(moe, default_vector(d))
    assert (output.routing.indices < 0).any() == (capacity is not None)
    assert torch.equal(moe.estimator.default_vectors, d)
    assert not moe.estimator.default_vectors.requires_grad


def test_default_vectors_follow_the_mean_outputs() -> None:
    moe = layer(DefaultVector(decay=0.75), capacity=Capacity(0.9))
    expected = torch.zeros(E, H, dtype=F64)
    idle = 0
    for _ in range(5):
        xs = [torch.randn(count, H, dtype=F64) for count in (3, 1)]
        routings = [moe(x).routing for x in xs]
        moe.update(routings)
        for i, expert in enumerate(moe.experts.experts):
            served = [
                expert.weight.detach() @ x[t]
                for x, routing in zip(xs, routings, strict=True)
                for t, ids in enumerate(routing.indices.tolist())
                if i in ids
            ]
            idle += not served
            if served:
                expected[i] = 0.75 * expected[i] + 0.25 * torch.stack(served).mean(0)
        vectors = moe.estimator.default_vectors
        torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-12)
    assert idle > 0


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_default_vector_decay(decay: float) -> None:
    with pytest.raises(ValueError, match=r"DefaultVector: decay must be in \[0, 1\), got"):
        DefaultVector(decay=decay)


# --- sparsemixer


@pytest.mark.parametrize("jitter", [0.01, 0.3, 5.0])
@pytest.mark.parametrize("capacity", [None, Capacity(0.6), Capacity(0.6, normalize="after_drop")])
@pytest.mark.parametrize("training", [True, False])
def test_sparsemixer(jitter: float, capacity: Capacity | None, training: bool) -> None:
    moe = layer(SparseMixer(jitter), capacity=capacity).train(training)
    output = check(moe, sparsemixer(jitter))
    assert (output.routing.indices < 0).any() == (capacity is not None)


def test_sparsemixer_draws_from_the_competition() -> None:
    """Frequencies of the pairs of experts, and of the full weight, within five deviations."""
    count, jitter = 40_000, 1.5
    moe = layer(SparseMixer(jitter))
    x = torch.randn(1, H, dtype=F64).expand(count, H)
    routing = moe(x).routing
    z = routing.logits[0].detach()
    first = competition(z, [], jitter)
    others = reduced = 0
    for a in range(E):
        second = competition(z, [a], jitter)
        for b in range(E):
            here = (routing.selected == torch.tensor([a, b])).all(1)
            chance = float(first[a] * second[b])
            assert within(int(here.sum()), count, chance)
            if b not in (a, int(second.argmax())) and here.any():
                others += int(here.sum())
                reduced += int((routing.weights[here, 1] < 0.5 * second[b]).sum())
    assert others > 1000
    assert within(reduced, others, 0.75)


def within(successes: int, count: int, chance: float) -> bool:
    """Whether a binomial count is within five standard deviations."""
    return abs(successes - count * chance) <= 5 * math.sqrt(count * chance * (1 - chance))


def test_sparsemixer_refuses_a_selection_bias() -> None:
    moe = layer("sparsemixer")
    moe.selection_bias = torch.zeros(E)
    with pytest.raises(ValueError, match=r"SparseMixer: selection_bias must be None, .* \[5\]"):
        moe(torch.randn(T, H, dtype=F64))


@pytest.mark.parametrize("jitter", [-0.1, math.inf])
def test_sparsemixer_jitter(jitter: float) -> None:
    with pytest.raises(ValueError, match=r"SparseMixer: jitter must be a finite number >= 0, got"):
        SparseMixer(jitter)


# --- gumbel_straight_through


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_gumbel_draws_without_replacement(temperature: float) -> None:
    count = 40_000
    moe = layer(GumbelStraightThrough(temperature))
    x = torch.randn(1, H, dtype=F64).expand(count, H)
    routing = moe(x).routing
    p = (routing.logits[0].detach() / temperature).softmax(0)
    for a in range(E):
        for b in range(E):
            here = (routing.selected == torch.tensor([a, b])).all(1)
            chance = 0.0 if a == b else float(p[a] * p[b] / (1 - p[a]))
            assert within(int(here.sum()), count, chance)
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(count, dtype=F64))


def test_gumbel_noise_is_for_training_only() -> None:
    x = torch.randn(T, H, dtype=F64)
    for temperature, training in ((1.0, False), (0.0, True)):
        moe = layer(GumbelStraightThrough(temperature)).train(training)
        state = torch.random.get_rng_state()
        routing = moe(x).routing
        assert torch.equal(routing.selected, routing.logits.topk(K).indices)
        assert torch.equal(torch.random.get_rng_state(), state)


def test_gumbel_ranks_noisy_scores_plus_the_selection_bias() -> None:
    moe = layer("gumbel_straight_through")
    moe.selection_bias = torch.tensor([0.0, 2.0, 0.0, 2.0, 0.0])
    routing = moe(torch.randn(T, H, dtype=F64)).routing
    assert torch.equal(routing.selected.sort(dim=1).values, torch.tensor([[1, 3]]).expand(T, 2))


@pytest.mark.parametrize("temperature", [-1.0, math.nan])
def test_gumbel_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"GumbelStraightThrough: temperature must be a finite"):
        GumbelStraightThrough(temperature)


def test_settings_are_shown() -> None:
    assert repr(SparseMixer(0.2)) == "SparseMixer(jitter=0.2)"
    assert "normalize='none', decay=0.5" in repr(layer(DefaultVector(0.5)).estimator)
    assert "normalize='topk', temperature=2.0" in repr(layer(GumbelStraightThrough(2.0)).estimator)
