"""torchmoe.testing.gradcheck accepts what is right, refuses what is wrong, and sees what moves."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from torchmoe import ops
from torchmoe.nn import Balance, Capacity, Estimator, Gate, MoE, Router, WithAttachedLoss
from torchmoe.testing import UnstableSelectionError, gradcheck

H, INNER, E, K, T = 4, 3, 4, 2, 6


@pytest.mark.parametrize("capacity", [None, Capacity(0.75)])
@pytest.mark.parametrize("normalize", ["none", "topk"])
def test_accepts_a_whole_layer(normalize: str, capacity: Capacity | None) -> None:
    moe = MoE(
        H,
        INNER,
        E,
        K,
        bias=True,
        gate=Gate("sigmoid", normalize),
        capacity=capacity,
        balance=Balance(z_loss_weight=0.1),
        router=Router(H, E, bias=True, input_jitter=0.1, logit_noise=0.3),
    )
    before = {name: value.clone() for name, value in moe.state_dict().items()}
    x = torch.randn(T, H)
    kept = x.clone()
    state = torch.get_rng_state()
    kwargs = {"token_mask": torch.tensor([True] * 5 + [False])}
    assert gradcheck(moe, x, kwargs=kwargs)
    assert gradcheck(moe, x, kwargs=kwargs, full=True, fast_mode=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)
    assert not x.requires_grad
    for name, value in moe.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in moe.parameters())


def test_accepts_a_function_and_other_arguments() -> None:
    indices = torch.tensor([[0, 1], [2, -1], [3, 0]])

    def f(logits: Tensor, ids: Tensor, scale: float) -> dict[str, Any]:
        weights = ops.gate_weights(
            logits, ids, score_function="softmax", normalize="topk", estimator="exact"
        )
        return {"weights": (scale * weights, None), "ids": ids}

    assert gradcheck(f, (torch.randn(3, E), indices, 2.0))


class Wrong(torch.autograd.Function):
    """The identity with a gradient that is a little off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 1.01 * grad


def test_catches_a_planted_error() -> None:
    class Planted(Estimator):
        """Wrong for the router only."""

        def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
            return super().weigh(Wrong.apply(logits), indices)

    moe = MoE(H, INNER, E, K, gate=Gate(estimator=Planted()))
    x = torch.randn(T, H)
    with pytest.raises(GradcheckError) as error:
        gradcheck(moe, x)
    text = str(error.value)
    assert re.search(r"^gradcheck: the gradient of inputs\[0\], router\.weight must be", text)
    assert "Found nothing wrong with experts.gate_up_proj, experts.down_proj." in text
    assert "got is 1.01 times expected all over router.weight" in text
    assert not gradcheck(moe, x, raise_exception=False)
    with pytest.raises(GradcheckError, match=r"all over router\.weight"):
        gradcheck(moe, x, full=True)
    assert not gradcheck(moe, x, full=True, raise_exception=False)


def test_a_module_that_keeps_a_graph() -> None:
    class Keeping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = super().forward(x)
            return self.kept

    module = Keeping(3, 2)
    module(torch.randn(4, 3))
    assert gradcheck(module, torch.randn(4, 3))


def test_checks_only_what_requires_a_gradient() -> None:
    def f(right: Tensor, wrong: Tensor) -> Tensor:
        return right * Wrong.apply(wrong)

    inputs = torch.randn(3), torch.randn(3)
    assert not gradcheck(f, inputs, raise_exception=False)
    inputs[0].requires_grad_()
    assert gradcheck(f, inputs)

    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    assert gradcheck(layer, torch.randn(5, 3))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (MoE(H, INNER, E, K, gate=Gate(estimator="straight_through")), "straight_through"),
        (MoE(H, INNER, E, K, router=Router(H, E, usage_scaling=True)), "scale_gradient"),
        (WithAttachedLoss(MoE(H, INNER, E, K)), "attach_loss"),
    ],
)
def test_says_why_a_replaced_gradient_is_not_the_derivative(module: nn.Module, reason: str) -> None:
    with pytest.raises(RuntimeError, match=f"{reason}.*deliberately gives another gradient"):
        gradcheck(module, torch.randn(T - 1, H))  # at perfect balance the loss has no gradient


def select_and_weigh(logits: Tensor) -> Tensor:
    """Jumps where the second and the third best logit meet."""
    indices = ops.select_experts(logits, K)
    return ops.gate_weights(
        logits, indices, score_function="softmax", normalize="none", estimator="exact"
    )


def tied_logits(gap: float) -> Tensor:
    """Well apart for every token but number 3, whose second and third best are `gap` apart."""
    logits = torch.stack([torch.arange(E).roll(t) for t in range(T)]).double()
    logits[3] = torch.tensor([0.0, 2.0, 1.0, 1.0 + gap], dtype=torch.float64)
    return logits


def test_moves_inputs_away_from_ties() -> None:
    seen = []

    def f(logits: Tensor) -> Tensor:
        seen.append(logits.detach().clone())
        return select_and_weigh(logits)

    assert gradcheck(f, tied_logits(0.0))
    assert torch.equal(seen[0], tied_logits(0.0))
    moved = seen[-1][3].sort().values.diff().min()
    assert moved > 0.99e-4
    assert (seen[-1] - seen[0]).abs().max() < 0.5
    again: list[Tensor] = []
    assert gradcheck(lambda x: (again.append(x.detach().clone()), select_and_weigh(x))[1], seen[0])
    assert torch.equal(again[-1], seen[-1])  # the same move every time


def test_a_tie_among_the_chosen_counts_too() -> None:
    logits = tied_logits(0.0)
    logits[3] = torch.tensor([0.0, 2.0, 2.0, 1.0])
    assert gradcheck(select_and_weigh, logits)


def test_names_the_token_whose_selection_changes() -> None:
    with pytest.raises(UnstableSelectionError, match=r"select_experts .* for token 3; .*this eps"):
        gradcheck(select_and_weigh, tied_logits(1e-7), margin=0.0)


def test_names_the_token_whose_tie_stays() -> None:
    def f(x: Tensor) -> Tensor:
        return select_and_weigh(torch.where(torch.arange(T)[:, None] == 4, x[:, :1], x))

    with pytest.raises(UnstableSelectionError, match=r"got 0 for token 4 after 10 attempts"):
        gradcheck(f, tied_logits(0.5))


def test_sees_choices_made_without_our_ops() -> None:
    def f(logits: Tensor) -> Tensor:
        return logits.softmax(-1).gather(1, logits.argmax(-1, keepdim=True))

    logits = tied_logits(0.5)
    logits[3] = torch.tensor([0.0, 2.0, 2.0 + 1e-8, 1.0], dtype=torch.float64)
    assert gradcheck(f, logits[:3])
    assert gradcheck(f, logits)  # at inputs that have been moved away
    for full in (False, True):
        with pytest.raises(
            UnstableSelectionError, match=r"argmax .*got \[1\] after \[2\] for token 3"
        ):
            gradcheck(f, logits, margin=0.0, full=full)


def test_sees_a_changing_number_of_choices() -> None:
    calls = []

    def f(logits: Tensor) -> Tensor:
        calls.append(1)
        return sum(select_and_weigh(logits) for _ in range(min(len(calls), 3)))

    with pytest.raises(UnstableSelectionError, match=r"must make the same choices in every eval"):
        gradcheck(f, tied_logits(0.5))


def test_masked_tokens_and_scores_of_minus_infinity_are_no_ties() -> None:
    mask = torch.arange(T) != 3
    closed = torch.zeros(E).masked_fill(torch.arange(E) < 3, -torch.inf)

    def f(logits: Tensor) -> Tensor:
        ids = ops.select_experts(logits + closed, K, token_mask=mask)
        return ops.gate_weights(
            logits, ids, score_function="softmax", normalize="none", estimator="exact"
        )

    seen = []
    x = tied_logits(0.0)
    assert gradcheck(lambda logits: (seen.append(logits.detach().clone()), f(logits))[1], x)
    assert (seen[-1] != x).sum() == 1  # the step in one entry, and no noise


def test_selection_bias_takes_part_in_the_gap() -> None:
    bias = torch.tensor([0.0, 0.0, 0.5, 0.0], dtype=torch.float64)

    def f(logits: Tensor) -> Tensor:
        ids = ops.select_experts(logits, K, selection_bias=bias)
        return ops.gate_weights(
            logits, ids, score_function="softmax", normalize="none", estimator="exact"
        )

    assert gradcheck(f, tied_logits(0.5))


def test_nothing_to_check() -> None:
    with pytest.raises(ValueError, match=r"gradcheck: inputs must hold a floating-point tensor"):
        gradcheck(lambda ids: ids, torch.arange(3))
