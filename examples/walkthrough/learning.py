"""Steps 7 and 8: what the gate learns from the error of the output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from walkthrough.decision import Decision
from walkthrough.made_up import (
    DTYPE,
    EXPERTS,
    FEATURES,
    POETRY,
    SLOTS_SO_FAR,
    TOP_K,
    WANTED,
    make_layer,
    make_router,
    usage_of,
    vector,
)
from walkthrough.printing import heading, numbers, row_of, table

# ---- computed


@dataclass(frozen=True)
class Gradient:
    """From the error of the output back to W_g, with the plain gate and the one that is scaled."""

    answers: Tensor
    """[K, H], what the chosen experts answer."""
    output: Tensor
    """[H], their sum with the gate's weights."""
    loss: float
    """Half the squared distance from WANTED."""
    output_gradient: Tensor
    """[H], dL/dy."""
    weight_gradient: Tensor
    """[K], dL/dw, which straight-through takes for dL/dp of the chosen experts."""
    logit_gradient: Tensor
    """[E], dL/dz."""
    plain: Tensor
    """[E, H], dL/dW_g."""
    usage: Tensor
    """[E], each expert's share of the slots so far."""
    scaled: Tensor
    """[E, H], dL/dW_g where the rows are scaled by 1 - usage."""


def differentiate(gate_input: Tensor) -> Gradient:
    """One backward pass through a layer, and another through one that scales by usage."""
    x = gate_input.unsqueeze(0)
    matrices = []
    for usage_scaling in (False, True):
        router = make_router(usage_scaling=usage_scaling)
        router.usage_decay = 0.0  # the slots so far are all the history there is
        slots = torch.tensor(SLOTS_SO_FAR)
        router.update(slots, slots.sum())
        layer = make_layer(router, balance_weight=0.0)
        y, _, routing = layer(x)
        loss = (y - vector(WANTED)).square().sum() / 2
        to_y, to_w, to_z, to_matrix = torch.autograd.grad(
            loss, [y, routing.weights, routing.logits, router.weight], retain_graph=True
        )
        matrices.append(to_matrix)
    chosen = routing.indices.T  # [K, 1]
    with torch.no_grad():
        alone = torch.ones(chosen.shape, dtype=DTYPE)
        answers = layer.experts(x.expand(TOP_K, -1), chosen, alone)
    plain, scaled = matrices
    return Gradient(
        answers,
        y[0].detach(),
        loss.item(),
        to_y[0],
        to_w[0],
        to_z[0],
        plain,
        usage_of(router),
        scaled,
    )


# ---- told


def tell_gradient(gradient: Gradient, decision: Decision) -> None:
    """From the error of the output back to W_g."""
    first, second = decision.chosen
    g = gradient.weight_gradient
    heading(7, "What the gate learns: the straight-through gradient on W_g")
    print(
        f"The two experts, small networks with random weights, answer; y = sum of w_i E_i(x)\n"
        f"E_{first}(x) = {row_of(gradient.answers[0])}   {EXPERTS[first]}\n"
        f"E_{second}(x) = {row_of(gradient.answers[1])}   {EXPERTS[second]}\n"
        f"y      = {row_of(gradient.output)}\n"
        f"wanted = {row_of(WANTED, 1)}   L = |y - wanted|^2 / 2 = {gradient.loss:.4f}\n"
        f"dL/dy  = y - wanted = {row_of(gradient.output_gradient)}\n\n"
        f"dL/dw_i = <dL/dy, E_i(x)>:   {g[0]:.4f} for {EXPERTS[first]}, {g[1]:.4f} for "
        f"{EXPERTS[second]}\n"
        "Choosing has no derivative. Straight-through treats choice and normalisation as if they\n"
        "were not there: dL/dp_i = dL/dw_i for the chosen, 0 for the others. From there on the\n"
        "chain rule is exact, with J = diag(p) - p p^T of the softmax:\n"
        "dL/dz = J^T dL/dp,   dL/dW_g = dL/dz x^T. Below 0: the step raises that logit."
    )
    table(
        ("expert", "dL/dp", "dL/dz", *(f"dL/dW_g {n}" for n in FEATURES)),
        [
            (
                f"{i} {EXPERTS[i]}",
                f"{g[decision.chosen.index(i)]:.4f}" if i in (first, second) else "0",
                f"{gradient.logit_gradient[i]:.4f}",
                *numbers(gradient.plain[i], 4),
            )
            for i in range(len(EXPERTS))
        ],
    )


def tell_scaling(gradient: Gradient) -> None:
    """The favourite learns to attract more slowly."""
    heading(8, "Its scaling by (1 - usage)")
    print(
        f"So far the experts have had {list(SLOTS_SO_FAR)} slots.\n"
        "usage_i = the share of the slots;   row i of dL/dW_g is multiplied by 1 - usage_i"
    )
    table(
        ("expert", "usage", "1 - usage", *(f"scaled {n}" for n in FEATURES)),
        [
            (
                f"{i} {EXPERTS[i]}",
                f"{usage:.2f}",
                f"{1 - usage:.2f}",
                *numbers(gradient.scaled[i], 4),
            )
            for i, usage in enumerate(gradient.usage.tolist())
        ],
    )
    usage = gradient.usage
    print(
        f"The favourite, {EXPERTS[POETRY]}, learns to attract at {1 - usage[POETRY]:.0%} of the "
        f"pace, {EXPERTS[7]}, hardly used, at {1 - usage[7]:.0%}."
    )
