"""Steps 1 to 6: one decision of the gate, and the balancing loss of it.

Each step is computed first, by the op or the layer that does the work in a real model too, and
then told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import torchmoe
from torchmoe import ops
from torchmoe.nn import SequenceRouter
from walkthrough.made_up import (
    BALANCE_WEIGHT,
    DTYPE,
    EXPERTS,
    FEATURES,
    GATE_BIAS,
    GATE_WEIGHT,
    QUERY,
    TOKEN_MATRIX,
    TOKENS,
    TOP_K,
    make_layer,
    make_router,
    probabilities,
    vector,
)
from walkthrough.printing import heading, numbers, row_of, table

# ---- computed


@dataclass(frozen=True)
class Pooling:
    """A sentence becomes one gate input."""

    tokens: Tensor
    """[S, H]."""
    query: Tensor
    """[H]."""
    weights: Tensor
    """[S], how much each token counts."""
    gate_input: Tensor
    """[H], their mean with those weights."""


def pool(matrix: Sequence[Sequence[float]] = TOKEN_MATRIX) -> Pooling:
    """Attention pooling of a sentence, with the fixed query."""
    router = SequenceRouter(make_router(usage_scaling=False), pooling="attention")
    query = router.query
    assert isinstance(query, Tensor)
    tokens = vector(matrix)
    with torch.no_grad():
        query.copy_(vector(QUERY))
        details = router(tokens.unsqueeze(0)).details  # a batch of one sentence
    return Pooling(
        tokens, query.detach(), details["pooling_weights"][0], details["gate_input"].flatten()
    )


@dataclass(frozen=True)
class Decision:
    """What the gate makes of one gate input."""

    gate_input: Tensor
    """[H]."""
    logits: Tensor
    """[E]."""
    probabilities: Tensor
    """[E]."""
    chosen: list[int]
    """K experts, the best first."""
    weights: Tensor
    """[K], of the chosen experts' outputs."""
    match: Tensor
    """[E], in percent: 100 where the gate input points where the expert's row of W_g does."""


@torch.no_grad()
def decide(gate_input: Tensor) -> Decision:
    """Logits, softmax, the top 2 and their weights."""
    router = make_router(usage_scaling=False)
    x = gate_input.unsqueeze(0)  # a batch of one
    logits = ops.router_logits(x, router.weight, router.bias)
    chosen = ops.select_experts(logits, TOP_K)
    weights = ops.gate_weights(
        logits, chosen, score_function="softmax", normalize="topk", estimator="straight_through"
    )
    match = torchmoe.geometry(router).match_percentages(x)
    return Decision(
        gate_input, logits[0], probabilities(logits)[0], chosen[0].tolist(), weights[0], match[0]
    )


@dataclass(frozen=True)
class Balance:
    """The loss that keeps the experts in even use."""

    fraction: Tensor
    """[E], each expert's share of the slots."""
    loss: float
    """N sum f P."""
    weighted: float
    """Lambda times that, as it is added to the task's loss."""


@torch.no_grad()
def balance(gate_input: Tensor) -> Balance:
    """The balancing loss of this one decision."""
    layer = make_layer(make_router(usage_scaling=False), balance_weight=BALANCE_WEIGHT)
    output = layer(gate_input.unsqueeze(0))
    slots = output.routing.tokens_per_expert
    loss = output.routing.losses["load_balancing_loss"]
    return Balance(slots.to(DTYPE) / slots.sum(), loss.item(), output.aux_loss.item())


# ---- told


def tell_pooling(pooling: Pooling) -> None:
    """Five tokens become one gate input."""
    heading(1, "Five tokens become one gate input")
    print(
        "Attention pooling: a_s = softmax over s of <query, h_s> / sqrt(4)\n"
        f"query = {row_of(pooling.query, 1)}, fixed here, learned in a model"
    )
    rows = [
        (token, *numbers(vector, 1), f"{weight:.1%}")
        for token, vector, weight in zip(
            TOKENS, pooling.tokens, pooling.weights.tolist(), strict=True
        )
    ]
    table(("H", *FEATURES, "weight a_s"), rows)
    print(
        f"gate input x = sum of a_s h_s = {row_of(pooling.gate_input)}\n"
        f'"{TOKENS[4]}" counts {pooling.weights[4]:.0%}, "a" {pooling.weights[1]:.0%}: '
        "what has content decides."
    )


def tell_logits(decision: Decision) -> None:
    """One number for each expert, then probabilities."""
    heading(2, "The gate scores the experts: z = W_g x + b_g")
    print("softmax: p_i = exp(z_i) / sum over all 8 experts of exp(z_j)")
    rows = [
        (f"{i} {name}", *numbers(weight, 1), f"{bias:.2f}", f"{z:.4f}", f"{p:.2%}")
        for i, (name, weight, bias, z, p) in enumerate(
            zip(
                EXPERTS,
                vector(GATE_WEIGHT),
                GATE_BIAS,
                decision.logits.tolist(),
                decision.probabilities.tolist(),
                strict=True,
            )
        )
    ]
    table(("expert", *(f"W_g {n}" for n in FEATURES), "b_g", "logit z", "softmax p"), rows)


def tell_choice(decision: Decision) -> None:
    """The top 2 and their weights."""
    heading(3, "The two best are chosen, and weighed")
    print(choice_of(decision))


def choice_of(decision: Decision) -> str:
    """The choice in two lines."""
    (first, second), (one, two) = decision.chosen, decision.weights.tolist()
    p = decision.probabilities
    return (
        f"top-2 = [{first}, {second}]: {EXPERTS[first]}, then {EXPERTS[second]}\n"
        f"w_i = p_i / (p_{first} + p_{second}):   "
        f"w_{first} = {p[first]:.4f} / ({p[first]:.4f} + {p[second]:.4f}) = {one:.4f},   "
        f"w_{second} = {two:.4f}"
    )


def tell_match(decision: Decision) -> None:
    """How well the gate input fits each expert's row."""
    match = decision.match
    heading(4, "How well does each expert match?")
    print(
        "match_i = 50 (1 + cos(x, w_i)) percent, w_i the expert's row of W_g: 100 where x points\n"
        "where the row does, 50 at a right angle, 0 against it"
    )
    order = match.argsort(descending=True).tolist()
    table(
        ("expert", "match", ""),
        [
            (f"{i} {EXPERTS[i]}", f"{match[i]:.1f}%", "#" * round(match[i].item() / 2.5))
            for i in order
        ],
    )
    print(
        f"The sentence matches {EXPERTS[order[0]]} by {match[order[0]]:.0f}%. The match looks at "
        "directions only; the logit\ncounts the row's length and b_g as well, so their orders may "
        "differ below the first."
    )


def tell_fixed_case(fixed: Decision) -> None:
    """The same gate, another input."""
    heading(5, "The same gate, another text: a case to check by hand")
    print(
        f"x      = {row_of(fixed.gate_input, 1)}\n"
        f"logits = {row_of(fixed.logits, 1)}\n"
        f"p      = {row_of(fixed.probabilities)}\n"
        f"{choice_of(fixed)}\n"
        f"More physics in it, and {EXPERTS[fixed.chosen[0]]} comes first: it matches by "
        f"{fixed.match[fixed.chosen[0]]:.0f}%."
    )


def tell_balance(balance: Balance, decision: Decision) -> None:
    """The loss that keeps experts in even use."""
    heading(6, "The balancing loss: N sum f P, lambda = 0.01")
    first, second = decision.chosen
    f, p = balance.fraction, decision.probabilities
    print(
        f"f_i = the expert's share of the slots (here one sentence's two), P_i = its mean p\n"
        f"N sum f P = 8 ({f[first]:.1f} x {p[first]:.4f} + {f[second]:.1f} x {p[second]:.4f}) "
        f"= {balance.loss:.4f}      1 = even, 8 = all to one expert\n"
        f"lambda N sum f P = {BALANCE_WEIGHT} x {balance.loss:.4f} = "
        f"{balance.weighted:.5f}, added to the loss of the task"
    )
