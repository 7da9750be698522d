"""The fourth step of `MoE.forward`: the experts' output, and that of the shared ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from torchmoe._checks import check_output

if TYPE_CHECKING:
    from torchmoe.nn.moe import MoE

_LAYOUT = "[num_tokens, hidden_size]"


def compute(
    layer: MoE,
    tokens: Tensor,
    logits: Tensor,
    indices: Tensor,
    weights: Tensor,
    token_mask: Tensor | None,
) -> tuple[Tensor, Any]:
    """The layer's output [T, H], and the estimator's statistics."""
    combined = layer.estimator.combine(
        tokens, logits, indices, weights, layer.experts, token_mask=token_mask
    )
    y, statistics = combined if isinstance(combined, tuple) else (combined, None)
    check_output("MoE", "gate.estimator.combine", y, tokens.shape, _LAYOUT, tokens.device)
    # Under a compiler a number is symbolic, and whether it is 1 would be a graph of its own.
    if (scale := layer._routed_scaling_factor) is not None:
        y = scale * y
    if layer.shared_experts is None:
        return y, statistics
    shared = layer.shared_experts(tokens)
    check_output("MoE", "shared_experts", shared, y.shape, _LAYOUT, y.device)
    if token_mask is not None:
        shared = shared.masked_fill(~token_mask.unsqueeze(-1), 0)
    return y + shared.to(y.dtype), statistics
