"""How exact is a step in bfloat16?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.contenders import (
    LOOP,
    OURS,
    TRANSFORMERS,
    Shape,
    loop_over_experts,
    mixtral_block,
    our_layer,
    transformers_version,
)
from benchmarks.cpu.section import Section, Settings
from benchmarks.markdown import table
from benchmarks.traffic import matrices, our_module, routed
from torchmoe import ops

RESULTS = ("y", "dx", "dw_in", "dw_out", "dweights")

# y from x [T, H], weights [T, K], w_in [E, 2 I, H] and w_out [E, H, I].
Experts = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The Frobenius norm of the difference over that of what is expected."""
    return float((actual.double() - expected).norm() / expected.norm())


def results_of(experts: Experts, operands: Sequence[Tensor], grad: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of x, w_in, w_out and the weights."""
    leaves = [operand.detach().requires_grad_() for operand in operands]
    y = experts(*leaves)
    x, weights, w_in, w_out = torch.autograd.grad(y, leaves, grad)
    return dict(zip(RESULTS, (y.detach(), x, w_in, w_out, weights), strict=True))


def looped(indices: Tensor, x: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """The plain loop's."""
    return loop_over_experts(x, indices, weights, w_in.unbind(), w_out.unbind())


def transformers_experts(block: nn.Module, indices: Tensor) -> Experts:
    """Those of its block, with the matrices that they are called with."""

    def experts(x: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        found: Tensor = functional_call(
            block.get_submodule("experts"),
            {"gate_up_proj": w_in, "down_proj": w_out},
            (x, indices, weights),
        )
        return found

    return experts


def errors(shape: Shape, transformers: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of each contender and result, on one choice of experts and the same bfloat16 numbers."""
    ours = our_layer(shape, torch.bfloat16)
    layer = our_module(ours)
    x, grad = (torch.randn(shape.tokens, shape.hidden).bfloat16() for _ in range(2))
    with torch.no_grad():
        indices, weights = routed(layer, x)
    operands = (x, weights, *matrices(layer))
    contenders: dict[str, Experts] = {
        OURS: lambda x, weights, w_in, w_out: ops.expert_mlp(
            x, indices, weights, w_in, None, w_out, None, "swiglu"
        ),
        LOOP: partial(looped, indices),
    }
    for name in transformers:
        peer = mixtral_block(shape, layer, name)
        contenders[peer.name] = transformers_experts(peer.module, indices)
    expected = results_of(
        partial(looped, indices), [one.double() for one in operands], grad.double()
    )
    return {
        name: compared(results_of(experts, operands, grad), expected)
        for name, experts in contenders.items()
    }


def compared(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The error of each result."""
    return {name: relative_error(actual[name], expected[name]) for name in RESULTS}


def section_rounding(settings: Settings) -> Section:
    """Relative errors against float64."""
    peers = () if transformers_version() is None else TRANSFORMERS
    rows: list[list[str]] = []
    for shape in settings.shapes:
        torch.manual_seed(0)
        for name, found in errors(shape, peers).items():
            rows.append([f"{shape}", name, *(f"{found[result]:.2e}" for result in RESULTS)])
    return Section(
        "Rounding",
        "The experts in bfloat16, forward and backward, against float64 on the same bfloat16 "
        "numbers, choices and float32 weights: the norm of the difference over the norm.",
        [table(["T, H, I, E, K", "", *RESULTS], rows, texts=2)],
    )
