"""The router's gradient from every expert, chosen or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from torchmoe.nn._sharding import gathers_in_forward
from torchmoe.nn.estimators.estimator import ExpertFunction


def attach_dense_gradient(y: Tensor, probs: Tensor, x: Tensor, experts: ExpertFunction) -> Tensor:
    """A copy of y that gives probs the gradient of the dense mixture.

    As `torchmoe.ops.attach_dense_gradient`, for experts of any kind.

    Args:
        y: [T, H].
        probs: [T, E].
        x: [T, H], what the experts see; gets no gradient here.
        experts: the layer's experts; their parameters get no gradient here.

    Returns:
        y's values; backward gives probs[t, i] the gradient <dL/dy_t, E_i(x_t)>.
    """
    # The parameters of this call, which need not be the module's own: functional_call lends it
    # others. Those of experts that FSDP shards are whole in the experts' own forward passes only.
    parameters: dict[str, Tensor] = {}
    if isinstance(experts, nn.Module) and not gathers_in_forward(experts):
        parameters = dict(experts.named_parameters())
    names = tuple(parameters)
    apply: Callable[..., Tensor] = _DenseGradient.apply
    return apply(y, probs, x, experts, names, *parameters.values())


class _DenseGradient(torch.autograd.Function):
    """Calls every expert in the backward pass, once each, on all tokens."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (torch's own)
        y: Tensor,
        probs: Tensor,
        x: Tensor,
        experts: ExpertFunction,
        names: tuple[str, ...],
        *parameters: Tensor,
    ) -> Tensor:
        """Copies y."""
        ctx.save_for_backward(x, probs, *parameters)
        ctx.experts = experts
        ctx.names = names
        ctx.autocast = _autocast_of(x.device.type)
        return y.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """<grad, E_i(x)> for probs."""
        x, probs, *parameters = ctx.saved_tensors
        grad_probs = torch.empty_like(probs)
        with ctx.autocast():
            for i in range(probs.shape[1]):
                ids = torch.full((x.shape[0], 1), i, device=x.device)
                call = x, ids, probs.new_ones(ids.shape)
                if parameters:
                    lent = dict(zip(ctx.names, parameters, strict=True))
                    output = torch.func.functional_call(ctx.experts, lent, call)
                else:
                    output = ctx.experts(*call)
                grad_probs[:, i] = (grad.to(probs.dtype) * output).sum(dim=1)
        return grad, grad_probs, None, None, None, *(None for _ in parameters)


def _autocast_of(device_type: str) -> Callable[[], torch.autocast]:
    """Enters the autocast that is on at the time of this call."""
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype, enabled)
