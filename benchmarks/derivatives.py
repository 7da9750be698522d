"""What do derivatives beyond the first gradient cost?

Run it as `python -m benchmarks.derivatives`. One layer without its losses, and the time (the
fastest of ten rounds in which they take turns), the products' floating-point operations and the
peak memory of its first gradient, which kernels form, next to what compositions of ops form: the
gradient with a graph of itself, a Jacobian-vector product in forward mode, and a Hessian-vector
product, reverse over reverse and forward over reverse.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.clock import interleave, timed
from benchmarks.contenders import Shape
from benchmarks.variants import Variant, run
from torchmoe.nn import MoE
from torchmoe.testing._compare_estimators import peak_bytes

ROUNDS = 10
Derivative = Callable[[], object]


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints a table for each shape."""
    return run(
        "python -m benchmarks.derivatives",
        "Times derivatives of one MoE layer, of the first order and beyond.",
        measure,
        arguments,
    )


def measure(shape: Shape) -> list[Variant]:
    """Every derivative of a new layer on random tokens, by its parameters and the tokens."""
    torch.manual_seed(0)
    derivatives = derivatives_of(
        MoE(shape.hidden, shape.intermediate, shape.experts, shape.top_k),
        torch.randn(shape.tokens, shape.hidden),
    )
    times = interleave({name: timed(call) for name, call in derivatives.items()}, ROUNDS)
    return [
        Variant(name, times[name].low, flops(call), memory(call))
        for name, call in derivatives.items()
    ]


def derivatives_of(moe: MoE, tokens: Tensor) -> dict[str, Derivative]:
    """The calls by name, the yardstick first."""
    names = [name for name, _ in moe.named_parameters()]
    inputs = [*(p.detach() for p in moe.parameters()), tokens]
    directions = [torch.randn_like(value) for value in inputs]
    weights = torch.randn_like(tokens)

    def objective(*values: Tensor) -> Tensor:
        parameters = dict(zip(names, values[:-1], strict=True))
        x = values[-1].view_as(values[-1])  # FlopCounterMode's hooks take no leaf
        output: Tensor = functional_call(moe, parameters, x).hidden_states
        return (output * weights).sum()

    def leaves() -> list[Tensor]:
        return [value.requires_grad_() for value in (v.detach() for v in inputs)]

    def gradient(*, create_graph: bool = False) -> tuple[Tensor, ...]:
        values = leaves()
        return torch.autograd.grad(objective(*values), values, create_graph=create_graph)

    def reverse_over_reverse() -> tuple[Tensor, ...]:
        values = leaves()
        first = torch.autograd.grad(objective(*values), values, create_graph=True)
        return torch.autograd.grad(first, values, directions)

    def along(function: Callable[..., object]) -> object:
        return jvp(function, tuple(inputs), tuple(directions))

    every = tuple(range(len(inputs)))
    return {
        "gradient": gradient,
        "gradient with a graph": lambda: gradient(create_graph=True),
        "Jacobian-vector": lambda: along(objective),
        "Hessian-vector, reverse": reverse_over_reverse,
        "Hessian-vector, forward": lambda: along(grad(objective, every)),
    }


def flops(call: Derivative) -> int:
    """Floating-point operations of the products that a call makes."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def memory(call: Derivative) -> int:
    """The most bytes that a call holds at one time."""

    def once() -> None:
        call()

    return peak_bytes(once, torch.device("cpu"))


if __name__ == "__main__":
    sys.exit(main())
