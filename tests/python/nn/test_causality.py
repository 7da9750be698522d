"""Which capacity options let a later token change what an earlier one gets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from limited import F64, by_logits
from torchmoe.nn import Assistance, Balance, Capacity, Gate, MoE

# --- causality ----------------------------------------------------------------------------------


def later_tokens_matter(moe: MoE, trials: int = 40) -> bool:
    """Whether a new last token changed what an earlier one got, in any of some random batches."""
    num_experts = moe.num_experts
    for trial in range(trials):
        generator = torch.Generator().manual_seed(trial)
        x = torch.randn(12, num_experts, generator=generator, dtype=F64)
        x[:, 0] += 1  # so that experts are full
        other = x.clone()
        other[-1] = 2 * torch.randn(num_experts, generator=generator, dtype=F64)
        seen = []
        for tokens in (x, other):
            torch.manual_seed(trial)
            with torch.no_grad():
                output = moe(tokens)
            routing = output.routing
            seen.append([t[:-1] for t in (output.hidden_states, routing.indices, routing.weights)])
        if any(not torch.equal(a, b) for a, b in zip(*seen, strict=True)):
            return True
    return False


BACKUP = {"overflow": "backup", "backup": (1, 2, 3, 0)}
NEXT_BEST = {"overflow": "next_best"}


@pytest.mark.parametrize("priority", [None, "random"])
@pytest.mark.parametrize("overflow", [{}, NEXT_BEST, BACKUP], ids=["drop", "next_best", "backup"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_token_by_token_is_causal(
    top_k: int, overflow: dict[str, Any], priority: str | None
) -> None:
    """At random only in training."""
    capacity = Capacity(0.8, order="token", priority=priority, **overflow)
    moe = by_logits(4, top_k, capacity, gate=Gate(normalize="none"))
    if priority is not None:
        moe.eval()
    assert not later_tokens_matter(moe)


@pytest.mark.parametrize(
    "options",
    [
        {"capacity": Capacity(0.8, order="token", dynamic=True)},
        {"capacity": Capacity(0.8, order="token", dynamic=True, **NEXT_BEST)},
        {"capacity": Capacity(0.8, order="token", normalize="after_drop", **NEXT_BEST)},
        {"capacity": Capacity(0.8, order="token", rounding="down", minimum=2)},
        {"capacity": Capacity(0.8, order="token"), "assistance": Assistance((1, 2, 3, 0))},
        {
            "capacity": Capacity(0.8, order="token", **NEXT_BEST),
            "assistance": Assistance((1, 2, 3, 0)),
        },
        {
            "capacity": Capacity(0.8, order="token", **NEXT_BEST),
            "gate": Gate("sigmoid", num_groups=2, top_groups=1),
            "balance": Balance(selection_bias_rate=0.1),
        },
        {"capacity": None, "assistance": Assistance((1, 2, 3, 0))},
        {"capacity": None},
    ],
    ids=[
        "dynamic",
        "dynamic_next_best",
        "after_drop",
        "down",
        "assistance",
        "assistance_next_best",
        "groups_and_bias",
        "assistance_alone",
        "no_capacity",
    ],
)
def test_causal_with_everything_else(options: dict[str, Any]) -> None:
    moe = by_logits(4, 2, options.pop("capacity"), **copy.deepcopy(options))
    moe.router.usage.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    if moe.assistance is not None:
        moe.assistance.assisted[:2] = True
    if moe.selection_bias is not None:
        moe.selection_bias.copy_(torch.tensor([0.1, -0.2, 0.0, 0.2]))
    assert not later_tokens_matter(moe)


@pytest.mark.parametrize("overflow", [{}, NEXT_BEST, BACKUP], ids=["drop", "next_best", "backup"])
def test_choice_by_choice_is_causal_with_one_choice_only(overflow: dict[str, Any]) -> None:
    one = by_logits(4, 1, Capacity(0.8, **overflow), gate=Gate(normalize="none"))
    assert not later_tokens_matter(one)
    assert later_tokens_matter(by_logits(4, 2, Capacity(0.8, **overflow)))


def test_choice_by_choice_is_not_causal_with_assistance() -> None:
    """The extra slot is a second choice."""
    moe = by_logits(
        4, 1, Capacity(0.8), gate=Gate(normalize="none"), assistance=Assistance((1, 2, 3, 0))
    )
    assert not later_tokens_matter(moe)
    moe.assistance.assisted[:] = True
    assert later_tokens_matter(moe)


@pytest.mark.parametrize("order", ["choice", "token"])
@pytest.mark.parametrize("priority", ["random", "weight"])
@pytest.mark.parametrize("overflow", [{}, NEXT_BEST, BACKUP], ids=["drop", "next_best", "backup"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_priority_is_not_causal(
    top_k: int, overflow: dict[str, Any], priority: str, order: str
) -> None:
    capacity = Capacity(0.8, order=order, priority=priority, **overflow)
    assert later_tokens_matter(by_logits(4, top_k, capacity, gate=Gate(normalize="none")))


def test_no_option_is_causal_over_calls_of_other_lengths() -> None:
    moe = by_logits(4, 1, Capacity(1, order="token"), gate=Gate(normalize="none"))
    x = torch.tensor([[1.0, 0, 0, 0]] * 8, dtype=F64)
    assert moe(x).routing.indices.flatten().tolist() == [0, 0] + [-1] * 6
    assert moe(x[:4]).routing.indices.flatten().tolist() == [0, -1, -1, -1]
    # Masked tokens are no tokens.
    mask = torch.arange(8) < 4
    assert moe(x, token_mask=mask).routing.indices.flatten().tolist() == [0] + [-1] * 7
