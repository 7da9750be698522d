"""A layer's input as tokens."""

from __future__ import annotations

from torch import Tensor

from torchmoe._checks import check_tensor, check_token_mask
from torchmoe.nn.routing import ADVICE, MoEOutput


def flatten(x: Tensor, token_mask: Tensor | None, hidden_size: int) -> tuple[Tensor, Tensor | None]:
    """X [..., H] and its mask [...] as tokens [T, H], 0 where masked, and a mask [T]."""
    if isinstance(x, MoEOutput):
        raise TypeError(f"MoE: x must be a tensor, got a MoEOutput; {ADVICE}")
    check_tensor("MoE", "x", x)
    if x.dim() < 1 or x.shape[-1] != hidden_size:
        raise RuntimeError(
            f"MoE: x must be [..., hidden_size] = [..., {hidden_size}], got shape {list(x.shape)}"
        )
    tokens = x.reshape(-1, hidden_size)
    if token_mask is None:
        return tokens, None
    check_token_mask("MoE", token_mask, x, x.dim() - 1)
    mask = token_mask.reshape(-1)
    # Attention leaves NaN at positions that see nothing; 0 * NaN would carry it into the router's
    # gradient.
    return tokens.masked_fill(~mask.unsqueeze(-1), 0), mask
