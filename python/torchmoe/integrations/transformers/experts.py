"""The experts of a model of transformers, computed by this library's ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchmoe import ops
from torchmoe._checks import check_module
from torchmoe.integrations.transformers.gates import Activation, activation_of

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The weighted sum of each token's experts: what transformers calls for a module of experts.

    An id outside [0, E) is a slot that is not routed, as in the ops.

    Args:
        self: a module of a class under transformers' `use_experts_implementation`.
        hidden_states: [..., H] floating, with T tokens in all.
        top_k_index: [T, K] integers.
        top_k_weights: [T, K] floating.

    Returns:
        [..., H] in the dtype of hidden_states.

    Raises:
        ValueError: the experts are quantised, split among processes, or none of transformers'.
        RuntimeError: a shape, dtype or device does not fit.
    """
    why = _obstacle(self)
    if why is not None:
        raise ValueError(
            f"torchmoe: experts must be floating-point tensors of this process alone, got {why}; "
            'choose experts_implementation="eager" or another of transformers\' for them'
        )
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    indices = top_k_index.to(torch.int64)
    weights = top_k_weights
    if weights.dtype not in (torch.float32, torch.float64):
        weights = weights.to(torch.float32)
    activation = _fused(self)
    if activation is None:
        y = _composed(self, x, indices, weights)
    else:
        y = _in_one_op(self, x, indices, weights, activation)
    return y.to(hidden_states.dtype).reshape(hidden_states.shape)


def supported(experts: nn.Module) -> str:
    """How a module of experts is computed.

    Args:
        experts: the part of a model's layer that transformers calls its experts.

    Returns:
        "fused": by one op, `expert_mlp`. "composed": by `permute`, `grouped_linear` and
        `unpermute`, with the module's own gate, activation and norm between them. "eager: " and
        the reason where a call is refused.

    Raises:
        TypeError: experts is not a module.
    """
    check_module("supported", "experts", experts)
    why = _obstacle(experts)
    if why is not None:
        return f"eager: {why}"
    return "composed" if _fused(experts) is None else "fused"


def _obstacle(experts: nn.Module) -> str | None:
    """What the ops cannot compute, in words."""
    kind = type(experts).__name__
    if not all(hasattr(experts, flag) for flag in _FLAGS):
        return f"{kind}, which is no class of transformers' experts interface"
    if experts._is_expert_parallel:
        return f"{kind} split among processes by expert parallelism"
    known = _names(experts)
    for name in known:
        tensor = getattr(experts, name, None)
        if not isinstance(tensor, Tensor):
            return f"{kind} without {name}"
        if isinstance(tensor, torch.distributed.tensor.DTensor):
            return f"{kind} whose {name} is a DTensor"
        if hasattr(tensor, "__tensor_flatten__"):
            return f"{kind} whose {name} is a {type(tensor).__name__}"
        if tensor.dtype not in _FLOATS:
            return f"{kind} whose {name} is quantised to {tensor.dtype}"
    for name in (*experts._parameters, *experts._buffers):
        if name.startswith(("gate_up_proj", "up_proj", "down_proj")) and name not in known:
            return f"{kind} with {name} in addition to its weights, as quantised ones have"
    return None


def _names(experts: nn.Module) -> tuple[str, ...]:
    """Of w_in and w_out, and of their biases where there are some."""
    into = "gate_up_proj" if experts.has_gate else "up_proj"
    names: tuple[str, ...] = (into, "down_proj")
    return (*names, *(f"{name}_bias" for name in names)) if experts.has_bias else names


def _parameters(experts: nn.Module) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """w_in [E, I or 2 * I, H], b_in, w_out [E, H, I] and b_out, as the ops take them."""
    w_in, w_out, *biases = (getattr(experts, name) for name in _names(experts))
    if experts.is_transposed:
        w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
    b_in, b_out = biases or (None, None)
    return w_in, b_in, w_out, b_out


def _fused(experts: nn.Module) -> Activation | None:
    """The activation for `expert_mlp`, None if the experts are not of its form."""
    return None if experts.has_post_expert_norm else activation_of(experts)


def _in_one_op(
    experts: nn.Module, x: Tensor, indices: Tensor, weights: Tensor, activation: Activation
) -> Tensor:
    settings: dict[str, Any] = {}
    if experts.has_gate:
        settings = activation._asdict() | {"interleaved": not experts.is_concatenated}
        del settings["name"]
    parameters = _parameters(experts)
    return ops.expert_mlp(x, indices, weights, *parameters, activation.name, **settings)


def _composed(
    experts: Any,  # noqa: ANN401 (of many classes)
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
) -> Tensor:
    w_in, b_in, w_out, b_out = _parameters(experts)
    plan = ops.dispatch_plan(indices, w_in.shape[0])
    rows = ops.permute(x, plan)
    rows = ops.grouped_linear(rows, w_in, b_in, plan.expert_offsets)
    rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
    rows = ops.grouped_linear(rows, w_out, b_out, plan.expert_offsets)
    if experts.has_post_expert_norm:
        rows = experts.post_expert_norm(rows)
    return ops.unpermute(rows, weights, plan)
