"""Scores that underflow in float32: what is formed from them, or ranked by them, is not lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchmoe
from reference import log_sigmoid
from torchmoe.nn import Balance, Capacity, ExpertChoiceRouter, Gate, MoE

E, K, H = 4, 2, 3


class Given(torch.nn.Module):
    """A router whose logits are what it reads: router_input."""

    num_experts = E

    def forward(self, logits: Tensor) -> Tensor:
        return logits


def layer(**options: Any) -> MoE:
    return MoE(H, 5, E, K, router=Given(), **options)


def selected(moe: MoE, *logits: list[float]) -> list[list[int]]:
    x = torch.randn(len(logits), H)
    chosen: list[list[int]] = moe(x, router_input=torch.tensor(logits)).routing.selected.tolist()
    return chosen


LOW = [-100.0, -99.0, -98.0, -95.0]  # sigmoids of 0
ONE = [0.0, -200.0, -199.0, -198.0]  # a softmax of 1, 0, 0, 0


@pytest.mark.parametrize(
    ("score_function", "logits", "expected"), [("sigmoid", LOW, [3, 2]), ("softmax", ONE, [0, 3])]
)
class TestRanking:
    def test_with_a_selection_bias(
        self, score_function: str, logits: list[float], expected: list[int]
    ) -> None:
        moe = layer(gate=Gate(score_function), balance=Balance(selection_bias_rate=0.001))
        assert selected(moe, logits) == [expected]
        moe.selection_bias.fill_(0.5)  # absorbs what is left of them
        assert selected(moe, logits) == [expected]
        moe.selection_bias.copy_(torch.tensor([0.0, 0.001, 0.0, 0.0]))
        assert selected(moe, logits)[0][:2].count(1) == 1, "a bias still ranks first"

    def test_with_groups(
        self, score_function: str, logits: list[float], expected: list[int]
    ) -> None:
        moe = layer(gate=Gate(score_function, num_groups=2, top_groups=2))
        assert selected(moe, logits) == [expected]

    def test_the_best_group(
        self, score_function: str, logits: list[float], expected: list[int]
    ) -> None:
        moe = layer(gate=Gate(score_function, num_groups=2, top_groups=1))
        assert selected(moe, logits) == [[3, 2] if score_function == "sigmoid" else [0, 1]]

    def test_rerouting_takes_the_next_best(
        self, score_function: str, logits: list[float], expected: list[int]
    ) -> None:
        """Four tokens with the same logits: those who come late get the experts that are left."""
        moe = layer(
            gate=Gate(score_function),
            balance=Balance(selection_bias_rate=0.001),
            capacity=Capacity(1, order="token", overflow="next_best"),
        )
        x = torch.randn(4, H)
        routing = moe(x, router_input=torch.tensor([logits]).expand(4, E)).routing
        best_first = sorted(range(E), key=lambda e: -logits[e])
        assert routing.selected.tolist() == [best_first[:2]] * 4
        assert routing.indices.tolist() == [best_first[:2]] * 2 + [best_first[2:]] * 2


def test_groups_that_are_equal_but_for_their_logits() -> None:
    """The larger sum of exp(logit) of a group's two best, not the lower group."""
    moe = MoE(H, 5, 6, 1, router=Given6(), gate=Gate("sigmoid", num_groups=2, top_groups=1))
    for logits, group in (
        ([-100.0, -100.0, -300.0, -99.7, -101.0, -300.0], 0),  # 2 e^-100 > 1.7 e^-100
        ([-100.0, -100.0, -300.0, -99.2, -101.0, -300.0], 1),
    ):
        routing = moe(torch.randn(1, H), router_input=torch.tensor([logits])).routing
        assert int(routing.selected[0, 0]) // 3 == group


class Given6(Given):
    num_experts = 6


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_experts_pick_the_best_tokens(score_function: str) -> None:
    """Expert 0 takes the two of four tokens with its largest logits, though its scores are 0."""
    first = torch.tensor([-120.0, -110.0, -130.0, -105.0])
    logits = torch.stack([first, torch.zeros(4), torch.zeros(4) - 1, torch.zeros(4) - 2], dim=1)
    router = ExpertChoiceRouter(Given(), K, score_function=score_function)
    ids = router(logits).indices
    assert [bool((row == 0).any()) for row in ids] == [False, True, False, True]


@pytest.mark.parametrize("low", [-40.0, -90.0, -500.0])
@pytest.mark.parametrize(
    "term", ["local_entropy_loss", "global_entropy_loss", "mutual_information_loss"]
)
def test_entropies(term: str, low: float) -> None:
    """Of shares that are those of the softmax, as far down as this."""
    logits = (torch.randn(7, E) + low).requires_grad_()
    function = getattr(torchmoe.losses, term)
    loss = function(logits, score_function="sigmoid")
    (grad,) = torch.autograd.grad(loss, logits)
    exact = log_sigmoid(logits.detach().double()).requires_grad_()
    expected = function(exact, score_function="softmax")
    (expected_grad,) = torch.autograd.grad(expected, exact)
    # A logit of this size is known to eps of itself, and exp carries that into a share.
    atol = 8 * abs(low) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(loss.double(), expected, atol=atol, rtol=0)
    torch.testing.assert_close(grad.double(), expected_grad, atol=atol, rtol=0)
    assert bool((grad != 0).all())


def test_a_router_cannot_leave_the_loss_by_going_down() -> None:
    moe = layer(gate=Gate("sigmoid"), balance=Balance(weight=1.0))
    logits = torch.tensor([[-90.0, -91.0, -95.0, -99.0]]).repeat(8, 1).requires_grad_()
    output = moe(torch.randn(8, H), router_input=logits)
    (grad,) = torch.autograd.grad(output.aux_loss, logits)
    assert output.aux_loss > 1
    assert bool((grad[:, 0] > 0).all())
    assert bool((output.routing.weights.sum(dim=1) - 1).abs().max() < 1e-6)
