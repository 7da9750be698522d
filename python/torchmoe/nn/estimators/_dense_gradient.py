"""The router's gradient from every expert, chosen or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

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
    # The parameters of this call, which need not be the module's own: functional_call substitutes
    # others. If FSDP shards the experts, theirs are whole in the experts' own forward passes only.
    parameters: dict[str, Tensor] = {}
    if isinstance(experts, nn.Module) and not gathers_in_forward(experts):
        parameters = dict(experts.named_parameters())
    names = tuple(parameters)
    apply: Callable[..., Tensor] = _DenseGradient.apply
    return apply(y, probs, x, experts, names, *parameters.values())


class _DenseGradient(torch.autograd.Function):
    """Calls every expert in the backward pass, once each, on all tokens."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        y: Tensor,
        probs: Tensor,
        x: Tensor,
        experts: ExpertFunction,
        names: tuple[str, ...],
        *parameters: Tensor,
    ) -> Tensor:
        """Copies y."""
        del probs, x, experts, names, parameters
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        """Keeps what the experts are called with."""
        del output
        _, probs, x, experts, names, *parameters = inputs
        ctx.save_for_backward(x, probs, *parameters)
        ctx.save_for_forward(x, probs, *parameters)
        ctx.experts = experts
        ctx.names = names
        ctx.autocast = _autocast_of(x.device.type)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """<grad, E_i(x)> for probs."""
        saved = ctx.saved_tensors  # a checkpoint gives them once
        probs = saved[1]
        with ctx.autocast():
            columns = [
                (grad.to(probs.dtype) * output).sum(dim=1) for output in _outputs(ctx, saved)
            ]
        others = (None for _ in saved[2:])
        return grad, torch.stack(columns, dim=1).to(probs.dtype), None, None, None, *others

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:  # noqa: ANN401
        """sum_i tangent_i E_i(x) for a tangent of probs."""
        of_y, of_probs, *_ = tangents
        if of_probs is None:
            return None if of_y is None else of_y.clone()
        with ctx.autocast():
            outputs = _outputs(ctx, ctx.saved_tensors)
            terms = [of_probs[:, i : i + 1] * output for i, output in enumerate(outputs)]
        mixture = torch.stack(terms).sum(dim=0)
        return mixture if of_y is None else of_y + mixture.to(of_y.dtype)


def _outputs(ctx: Any, saved: tuple[Tensor, ...]) -> Iterator[Tensor]:  # noqa: ANN401
    """The output of each expert for all tokens."""
    x, probs, *parameters = saved
    for i in range(probs.shape[1]):
        ids = torch.full((x.shape[0], 1), i, device=x.device)
        call = x, ids, probs.new_ones(ids.shape)
        if parameters:
            lent = dict(zip(ctx.names, parameters, strict=True))
            yield torch.func.functional_call(ctx.experts, lent, call)
        else:
            yield ctx.experts(*call)


def _autocast_of(device_type: str) -> Callable[[], torch.autocast]:
    """Enters the autocast that is on at the time of this call."""
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype, enabled)
