"""The terms against numbers worked by hand and those of their papers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from loss_formulas import (
    F64,
    INF,
    E,
    K,
    T,
    load,
)
from op_case import assert_close, tolerance
from torchmoe import losses

# --- numbers worked by hand ---------------------------------------------------------------------


def test_importance_worked_by_hand() -> None:
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=F64)
    indices = torch.tensor([[0, 1], [0, 1]])
    # Sums 1.25 and 0.75: mean 1, variance 1/16.
    assert losses.importance_loss(weights, indices, 2).item() == pytest.approx(1 / 16)
    # A third expert without tokens: mean 2/3, variance (49 + 1 + 64) / 432.
    assert losses.importance_loss(weights, indices, 3).item() == pytest.approx(19 / 32)
    # A slot that is not routed: sums 1.25 and 0.5, mean 7/8, variance 9/64.
    indices[0, 1] = -1
    assert losses.importance_loss(weights, indices, 2).item() == pytest.approx(9 / 49)
    # An expert that is named twice gets both weights: sums 1 and 1.
    twice = torch.tensor([[0, 0], [1, 1]])
    assert losses.importance_loss(weights, twice, 2) == 0


@pytest.mark.parametrize("num_experts", [1, 2, 7])
def test_importance_of_one_expert_alone(num_experts: int) -> None:
    weights = torch.rand(9, 1, dtype=F64)
    indices = torch.full((9, 1), num_experts - 1)
    loss = losses.importance_loss(weights, indices, num_experts)
    assert loss.item() == pytest.approx(num_experts - 1)


def test_importance_of_nothing_is_zero() -> None:
    weights = torch.rand(4, 2, dtype=F64, requires_grad=True)
    loss = losses.importance_loss(weights, torch.full((4, 2), -1), 3)
    loss.backward()
    assert loss == 0
    assert (weights.grad == 0).all()


def test_load_worked_by_hand() -> None:
    # Phi(1) = 0.8413447461 against Phi(-1): mean 1/2, deviation Phi(1) - 1/2.
    logits = torch.tensor([[3.0, 1.0]], dtype=F64)
    expected = (2 * 0.8413447460685429 - 1) ** 2
    assert losses.load_loss(logits, 1, deviation=2.0).item() == pytest.approx(expected)
    # The default deviation is 1 / E.
    assert losses.load_loss(logits / 4, 1).item() == pytest.approx(expected)
    # Top 2 of (2, 1, 0): the two are measured against the third, the third against the second.
    logits = torch.tensor([[1.0, 0.0, 2.0]], dtype=F64)
    chances = torch.special.ndtr(torch.tensor([1.0, -1.0, 2.0], dtype=F64))
    expected = (chances.var(correction=0) / chances.mean() ** 2).item()
    assert losses.load_loss(logits, 2, deviation=1.0).item() == pytest.approx(expected)


def test_load_at_ties() -> None:
    # Everybody's rival is as good: Phi(0) for each.
    assert losses.load_loss(torch.zeros(3, 4, dtype=F64), 2) == 0
    # (1, 0, 0) with top 1: P is Phi(1), and Phi(-1) for both others.
    logits = torch.tensor([[1.0, 0.0, 0.0]], dtype=F64)
    expected = load(logits, 1, deviation=1.0).item()
    assert losses.load_loss(logits, 1, deviation=1.0).item() == pytest.approx(expected)


ONE, HALF, QUARTER = 1.0, 0.5, 0.25


@pytest.mark.parametrize(
    ("rows", "local", "of_mean"),
    [
        ([[HALF, QUARTER, QUARTER, 0]], 1.5 * math.log(2), 1.5 * math.log(2)),
        ([[QUARTER] * 4] * 3, math.log(4), math.log(4)),
        ([[ONE, 0, 0, 0], [ONE, 0, 0, 0]], 0, 0),
        ([[ONE, 0, 0, 0], [0, ONE, 0, 0]], 0, math.log(2)),
        ([[HALF, HALF, 0, 0], [0, 0, HALF, HALF]], math.log(2), math.log(4)),
        # The mean is (3/4, 1/4, 0, 0).
        (
            [[ONE, 0, 0, 0], [HALF, HALF, 0, 0]],
            math.log(2) / 2,
            2 * math.log(2) - 0.75 * math.log(3),
        ),
    ],
)
def test_entropies_worked_by_hand(rows: list[list[float]], local: float, of_mean: float) -> None:
    logits = torch.tensor(rows, dtype=F64).log()  # -inf where a share is 0
    near = pytest.approx
    got = losses.local_entropy_loss(logits, score_function="softmax").item()
    assert got == near(local, abs=1e-14)
    got = losses.global_entropy_loss(logits, score_function="softmax").item()
    assert got == near(math.log(4) - of_mean, abs=1e-14)
    got = losses.mutual_information_loss(logits, score_function="softmax").item()
    assert got == near(local - of_mean, abs=1e-14)


def test_sigmoid_scores_are_divided_by_their_sum() -> None:
    # Scores 1/2, 1/2 and 1/4, 1/4: the same shares.
    logits = torch.tensor([[0.0, 0.0], [-math.log(3), -math.log(3)]], dtype=F64)
    got = losses.local_entropy_loss(logits, score_function="sigmoid")
    assert got.item() == pytest.approx(math.log(2))
    # Scores 1/2 and 1/4: shares 2/3 and 1/3.
    logits = torch.tensor([[0.0, -math.log(3)]], dtype=F64)
    got = losses.local_entropy_loss(logits, score_function="sigmoid")
    assert got.item() == pytest.approx(math.log(3) - 2 / 3 * math.log(2))


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_mutual_information_is_made_of_the_two_entropies(score_function: str) -> None:
    logits = torch.randn(T, E, dtype=F64)
    given = {"score_function": score_function}
    both = losses.local_entropy_loss(logits, **given) + losses.global_entropy_loss(logits, **given)
    got = losses.mutual_information_loss(logits, **given)
    assert_close(got, both - math.log(E), tolerance(both, n=T + E, wide=F64, stored=F64))
    assert -math.log(E) < got < 0


# --- Shazeer et al., arXiv 1701.06538, as published ---------------------------------------------


def keep_top_k(v: Tensor, k: int) -> Tensor:
    """Equation 5."""
    kept = torch.full_like(v, -INF)
    top = v.topk(k, dim=1)
    return kept.scatter(1, top.indices, top.values)


def test_importance_equals_the_published_formula() -> None:
    """Equations 3, 6 and 7: G(x) = softmax(KeepTopK(H(x), k)), CV^2 of its sum over the batch."""
    hidden = torch.randn(T, E, dtype=F64)
    gates = keep_top_k(hidden, K).softmax(1)
    total = gates.sum(0)
    expected = total.var(correction=0) / total.mean() ** 2

    top = hidden.topk(K, dim=1)
    got = losses.importance_loss(top.values.softmax(1), top.indices, E)
    assert_close(got, expected, tolerance(expected, n=T + E, wide=F64, stored=F64))


def test_load_equals_the_published_formula() -> None:
    """Equations 4 and 8 to 11, with x W_noise the same number for all, so one deviation."""
    x, w_g = torch.randn(T, 4, dtype=F64), torch.randn(4, E, dtype=F64)
    deviation = torch.nn.functional.softplus(torch.tensor(0.3, dtype=F64))
    clean = x @ w_g
    hidden = clean + torch.randn(T, E, dtype=F64) * deviation
    chance = torch.empty(T, E, dtype=F64)
    for i in range(E):
        # kth_excluding(H(x), k, i): the k-th highest component of H(x), excluding component i.
        rest = torch.cat([hidden[:, :i], hidden[:, i + 1 :]], dim=1)
        kth_excluding = rest.sort(dim=1, descending=True).values[:, K - 1]
        chance[:, i] = torch.special.ndtr((clean[:, i] - kth_excluding) / deviation)
    total = chance.sum(0)
    expected = total.var(correction=0) / total.mean() ** 2

    got = losses.load_loss(clean, K, noisy_logits=hidden, deviation=deviation.item())
    assert_close(got, expected, tolerance(expected, n=T + E, wide=F64, stored=F64))
    # P is the share of new draws of expert i's noise with which it is among the top k.
    draws = clean.unsqueeze(0) + deviation * torch.randn(4000, T, E, dtype=F64)
    for i in range(E):
        anew = hidden.expand(4000, T, E).clone()
        anew[:, :, i] = draws[:, :, i]
        chosen = (anew.topk(K, dim=2).indices == i).any(2).double().mean(0)
        # 5 standard deviations of a share of 4000 draws.
        assert (chosen - chance[:, i]).abs().max() < 5 * 0.5 / 4000**0.5
