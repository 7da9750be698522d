"""The ops in the order of a layer, for the tests that look at all of them together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from situations import normal
from torchmoe import ops


@dataclass(frozen=True)
class Layer:
    """Leaves of a small layer; `forward` is a function of them and of x alone."""

    router: Tensor
    w_in: Tensor
    b_in: Tensor
    w_out: Tensor
    b_out: Tensor
    top_k: int
    capacity: int
    order: str = "choice"

    @staticmethod
    def make(hidden: int, width: int, experts: int, top_k: int, capacity: int) -> Layer:
        def leaf(*shape: int) -> Tensor:
            return (normal(*shape, dtype=torch.float32) * 0.3).requires_grad_()

        return Layer(
            leaf(experts, hidden),
            leaf(experts, 2 * width, hidden),
            leaf(experts, 2 * width),
            leaf(experts, hidden, width),
            leaf(experts, hidden),
            top_k,
            capacity,
        )

    @property
    def parameters(self) -> list[Tensor]:
        return [self.router, self.w_in, self.b_in, self.w_out, self.b_out]

    def forward(self, x: Tensor) -> Tensor:
        """Decide, weigh, dispatch and compute, account; the loss comes attached to y."""
        experts = self.router.size(0)
        logits = ops.router_logits(x, self.router)
        selected = ops.select_experts(logits.detach(), self.top_k)
        weights = ops.gate_weights(
            logits, selected, score_function="softmax", normalize="topk", estimator="exact"
        )
        indices = ops.limit_capacity(selected, self.capacity, order=self.order, num_experts=experts)
        mlp = (self.w_in, self.b_in, self.w_out, self.b_out)
        y = ops.expert_mlp(x, indices, weights, *mlp, "swiglu")
        counts = ops.dispatch_plan(selected, experts).expert_offsets.diff()
        fraction = counts / counts.sum().clamp(min=1)
        balance = ops.load_balancing_loss(logits, fraction, score_function="softmax")
        return ops.attach_loss(y, balance + ops.router_z_loss(logits), 0.01)

    def step(self, x: Tensor) -> list[Tensor]:
        """The output, and the gradients of x and of every parameter."""
        x = x.detach().requires_grad_()
        y = self.forward(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *self.parameters])]
