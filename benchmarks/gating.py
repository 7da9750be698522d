"""What does each router cost, and communication between experts?

Run it as `python -m benchmarks.gating`. One layer takes every router in turn, and then experts that
talk: the time of a forward and backward pass (the fastest of ten rounds in which they take turns)
and the most memory it holds beyond what it held before, next to the linear router's. The third
number is what the arithmetic alone would lead one to expect: the floating-point operations of the
layer's products, its experts', router's and communication's, over those with the linear router.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.clock import Run, interleave
from benchmarks.contenders import Contender, Shape
from benchmarks.variants import Variant, run
from torchmoe.nn import (
    CosineRouter,
    ExpertChoiceRouter,
    ExpertCommunication,
    Experts,
    HashRouter,
    MoE,
    Router,
    SequenceRouter,
)
from torchmoe.testing._compare_estimators import peak_bytes

LENGTH = 128  # tokens of a sequence
VOCABULARY = 32_000
ROUNDS = 10
LINEAR, COMMUNICATION = "linear", "linear + communication"

ROUTERS: dict[str, Callable[[Shape], nn.Module]] = {
    LINEAR: lambda shape: Router(shape.hidden, shape.experts),
    "cosine": lambda shape: CosineRouter(shape.hidden, shape.experts),
    "hash": lambda shape: HashRouter(shape.experts, shape.top_k),
    "sequence": lambda shape: SequenceRouter(Router(shape.hidden, shape.experts)),
    "expert_choice": lambda shape: ExpertChoiceRouter(
        Router(shape.hidden, shape.experts), shape.top_k
    ),
    COMMUNICATION: lambda shape: Router(shape.hidden, shape.experts),
}


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints a table for each shape."""
    return run(
        "python -m benchmarks.gating",
        "Times one MoE layer, forward + backward, with each router and with communication.",
        measure,
        arguments,
        multiple=LENGTH,
    )


def measure(shape: Shape) -> list[Variant]:
    """Every router on a new layer, and random sequences."""
    torch.manual_seed(0)
    size = shape.tokens // LENGTH, LENGTH, shape.hidden
    x, grad = torch.randn(size, requires_grad=True), torch.randn(size)
    token_ids = torch.randint(VOCABULARY, size[:2])
    runs: dict[str, Run] = {}
    for name in ROUTERS:
        contender = make(name, shape, token_ids)
        runs[name] = lambda contender=contender: contender.step(x, grad)  # type: ignore[misc]
    for step in runs.values():  # what a first call sets up
        step()
    times = interleave(runs, ROUNDS)
    return [
        Variant(name, times[name].low, flops(name, shape), memory(step))
        for name, step in runs.items()
    ]


def memory(step: Run) -> int:
    """The most bytes that a step holds at one time."""

    def once() -> None:
        step()

    return peak_bytes(once, torch.device("cpu"))


def make(name: str, shape: Shape, token_ids: Tensor) -> Contender:
    """The layer with one of the routers."""
    sizes = shape.hidden, shape.intermediate, shape.experts
    experts = None
    if name == COMMUNICATION:
        experts = ExpertCommunication(Experts(*sizes), shape.hidden, shape.experts)
    layer = MoE(*sizes, shape.top_k, router=ROUTERS[name](shape), experts=experts)
    router_input = token_ids if name == "hash" else None
    return Contender(
        name, layer, lambda module, x: module(x, router_input=router_input).hidden_states
    )


def flops(name: str, shape: Shape) -> int:
    """Floating-point operations of all products, forward and backward, which takes two thirds."""
    tokens, hidden, experts = shape.tokens, shape.hidden, shape.experts
    linear = 6 * tokens * hidden * experts
    if name == "cosine":
        dimensions = CosineRouter(hidden, experts).projection_size
        return shape.flops + 6 * tokens * dimensions * (hidden + experts)
    if name == "hash":
        return shape.flops
    if name == "sequence":  # scores and weighted sum of all tokens, logits of each sequence
        return shape.flops + 12 * tokens * hidden + linear // LENGTH
    if name == COMMUNICATION:
        width = ExpertCommunication(lambda x, indices, weights: x, hidden, experts).size
        projections = 6 * tokens * hidden * width * (3 * shape.top_k + 1)
        attention = 12 * tokens * width * shape.top_k**2
        return shape.flops + linear + projections + attention
    return shape.flops + linear


if __name__ == "__main__":
    sys.exit(main())
