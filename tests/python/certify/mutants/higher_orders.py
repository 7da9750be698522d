"""Bugs that only second derivatives and forward mode show."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from certify.layers.grouped import (
    GroupedMoE,
    WeightedGLU,
)
from certify.layers.parts import wide
from certify.mutants.registry import mutant


class GLUSavedIntermediates(Function):
    """act(gate) * up * weight that saves its intermediates and not its inputs."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, act: Any) -> Tensor:
        """The weighted activation."""
        gate, up = wide(hidden).chunk(2, dim=-1)
        value, slope = act(gate)
        ctx.value, ctx.slope, ctx.up, ctx.weight, ctx.dtype = value, slope, up, weight, hidden.dtype
        return (value * up * weight.unsqueeze(1)).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Right gradients of which only grad has a graph."""
        grad, column = wide(grad), ctx.weight.detach().unsqueeze(1)
        d_gate = grad * column * ctx.up * ctx.slope
        d_up = grad * column * ctx.value
        d_weight = (grad * ctx.value * ctx.up).sum(-1).to(ctx.weight.dtype)
        return torch.cat([d_gate, d_up], dim=-1).to(ctx.dtype), d_weight, None


@mutant(
    "double_backward_of_intermediates",
    base="grouped",
    kind="second derivatives silently wrong: the backward pass uses detached intermediates",
    source="https://github.com/pytorch/pytorch/issues/76185",
    report="Intermediates saved in the forward pass and used in the backward pass make the double "
    "backward silently wrong.",
    use="double backward; first gradients are right",
)
class DoubleBackwardOfIntermediates(GroupedMoE):
    """No graph behind what was saved."""

    glu = GLUSavedIntermediates


class GLUJvpOfHidden(WeightedGLU):
    """A tangent without the weights' part."""

    @staticmethod
    def jvp(ctx: Any, hidden_t: Tensor | None, weight_t: Tensor | None, _: None) -> Tensor:
        """The tangent of hidden alone."""
        return WeightedGLU.jvp(ctx, hidden_t, None, None)


@mutant(
    "forward_mode_without_the_router",
    base="grouped",
    kind="forward-mode derivatives silently 0 for one input of a custom function",
    source="kind reported, e.g. https://github.com/pytorch/functorch/issues/207",
    report="autograd.Function is silently incorrect under other transforms, forward mode among "
    "them.",
    use="forward-mode derivatives",
)
class ForwardModeWithoutTheRouter(GroupedMoE):
    """Reverse mode is right."""

    glu = GLUJvpOfHidden
