"""Rows in plain order through the ops, whose results are the same for any number of threads."""

from __future__ import annotations

import torch
from torch import Tensor

from torchmoe import ops


def widened(x: Tensor, parameter: Tensor) -> Tensor:
    """The tokens, in the parameter's dtype if that is wider, as a router's may be."""
    is_wider = torch.promote_types(x.dtype, parameter.dtype) == parameter.dtype
    return x.to(parameter.dtype) if is_wider else x


def linear(rows: Tensor, weight: Tensor) -> Tensor:
    """The rows [N, H] times the transpose of weight [O, H]: [N, O]."""
    return ops.grouped_linear(rows, weight.unsqueeze(0), None, _all(rows.shape[0], rows.device))


def in_slot_order(num_tokens: int, top_k: int, device: torch.device) -> ops.DispatchPlan:
    """A plan for [T, K] slots, all routed, whose rows are the slots as they come.

    With it `ops.unpermute` is a weighted sum over the slots of each token, and `ops.permute` gives
    every slot its token.
    """
    slots = torch.arange(num_tokens * top_k, device=device)
    return ops.DispatchPlan(_all(slots.shape[0], device), slots, slots.view(num_tokens, top_k))


def exponentials(scores: Tensor, mask: Tensor | None) -> Tensor:
    """What softmax over the last dimension is proportional to, 1 for the largest of each row.

    The gradient of torch's softmax depends on the number of threads.

    Args:
        scores: [..., S], S > 0.
        mask: broadcasts to scores; where it is False the result is 0, unless it is False for a
            whole row, which gets 1.
    """
    if mask is not None:
        # -inf would leave NaN where a whole row is masked.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (scores - scores.detach().amax(dim=-1, keepdim=True)).exp()


def _all(rows: int, device: torch.device) -> Tensor:
    """Offsets that give every row to one expert."""
    return torch.arange(2, device=device) * rows
