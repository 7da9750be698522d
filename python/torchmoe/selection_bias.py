"""Balance without a loss: a bias that affects the ranking only and is moved against the load."""

from __future__ import annotations

import torch
from torch import Tensor

from torchmoe._checks import check_counts, check_flag, check_not_negative, check_tensor


def update_selection_bias(
    bias: Tensor, tokens_per_expert: Tensor, rate: float, centred: bool = False
) -> Tensor:
    """The selection bias after one step: up by `rate` below the mean load, down by it above.

        bias_i + rate * sign(mean(tokens_per_expert) - tokens_per_expert_i)

    Auxiliary-loss-free balancing (Wang et al., arXiv 2408.15664), as in DeepSeek-V3 (arXiv
    2412.19437). The bias is added to the scores for ranking only: weights and their gradients never
    see it.

    Args:
        bias: [E] floating.
        tokens_per_expert: [E], slots per expert of one step, over all micro-batches and processes.
        rate: how far one step moves each entry, a finite number >= 0; 0.001 in DeepSeek-V3.
        centred: subtracts the mean of the step's moves, so that the mean of the bias does not
            change. Selection does not depend on that mean, which may drift otherwise.

    Returns:
        The new bias [E] in the dtype of bias; without a counted token a copy of bias.

    Raises:
        TypeError: an argument has another type.
        ValueError: rate or a count is negative or not finite (counts are checked on the CPU only).
        RuntimeError: a shape or dtype does not fit.
    """
    rate = check_not_negative("update_selection_bias", "rate", rate)
    check_flag("update_selection_bias", "centred", centred)
    check_tensor("update_selection_bias", "bias", bias)
    if bias.dim() != 1 or not bias.is_floating_point():
        raise RuntimeError(
            "update_selection_bias: bias must be [num_experts] and floating, "
            f"got {bias.dtype} of shape {list(bias.shape)}"
        )
    check_counts(
        "update_selection_bias", "tokens_per_expert", tokens_per_expert, bias.shape[0], bias.device
    )
    counts = tokens_per_expert.double()
    move = torch.sign(counts.mean() - counts)
    if centred:
        move = move - move.mean()
    return (bias.double() + rate * move).to(bias.dtype)
