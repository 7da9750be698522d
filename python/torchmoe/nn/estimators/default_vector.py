"""An average output takes the place of each expert that a token did not choose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchmoe import ops
from torchmoe._by_expert import named
from torchmoe._checks import Checked, check_share
from torchmoe._wide import wide, wide_dtype
from torchmoe.nn._buffers import Remembering
from torchmoe.nn._rows import linear
from torchmoe.nn.estimators.estimator import Estimator, ExpertFunction, call_experts


class DefaultVector(Estimator, Remembering):
    """Every expert's score enters the output and so gets a gradient, at the cost of top-k routing.

        forward   y = sum_{i in S} w_i E_i(x) + sum_{i not in S} p_i d_i
        backward  its derivative: dL/dp_i = <dL/dy, E_i(x)> for the experts of S, <dL/dy, d_i> for
                  the others, no gradient for d
        update    d_i <- decay * d_i + (1 - decay) * mean of E_i(x) over the tokens it served

    S are the experts that served the token: the expert of a slot dropped by capacity is not in S. d
    is the buffer `default_vectors`, 0 at first. The forward pass reads it and `MoE.update` moves
    it; the vector of an expert that served no token does not change (Default MoE, Panda et al.,
    arXiv 2504.12463). The output in evaluation is the same.

    In addition to the layer itself this takes 2 T E H FLOPs forward and as many backward, and keeps
    the tokens and the outputs of all T K slots, [T K, H] each, for the backward pass.

    Args:
        decay: weight of the past in d, in [0, 1); 0.99 remembers about a hundred updates. With a
            short memory d changes with every batch and adds noise to the output.

    Attributes:
        default_vectors: [E, H] buffer, float32 or wider.

    Raises:
        ValueError: decay is out of range.
    """

    normalizes = ("none",)
    refusal = "whose coefficients w and p would no longer add up to 1"
    settings = ("decay",)
    takes_experts_alone = True
    wide_buffers = ("default_vectors",)
    default_vectors: Tensor

    decay = Checked(check_share)

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay

    def bind(
        self,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **layer: Any,  # noqa: ANN401 (as the base class says)
    ) -> None:
        """Makes the buffer."""
        super().bind(**layer, device=device, dtype=dtype)
        shape = (self.num_experts, self.hidden_size)
        vectors = torch.zeros(shape, device=device, dtype=wide_dtype(dtype))
        self.register_buffer("default_vectors", vectors)

    def reset_parameters(self) -> None:
        """Sets the default vectors to 0."""
        nn.init.zeros_(self.default_vectors)

    def combine(
        self,
        x: Tensor,
        logits: Tensor,
        indices: Tensor,
        weights: Tensor,
        experts: ExpertFunction,
        *,
        token_mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The output, and for `update` the sum of each expert's outputs [E, H] and their number.

        The experts see each slot as a token of its own with weight 1, since their sum over a
        token's slots does not tell their outputs apart.
        """
        plan = ops.dispatch_plan(indices, self.num_experts)
        rows = ops.permute(x, plan)  # [N, H]
        chosen = indices.flatten()[plan.row_to_slot].unsqueeze(1)  # [N, 1]
        outputs = call_experts(experts, rows, chosen, weights.new_ones(chosen.shape))  # [N, H]
        y = ops.unpermute(outputs, weights, plan)

        served = named(indices, self.num_experts)  # [T, E]
        others = self.probs(logits, token_mask).masked_fill(served, 0)
        y = y + linear(others, self.default_vectors.to(others.dtype).t()).to(y.dtype)

        rows = outputs.detach().to(wide(self.default_vectors[:0]).dtype)
        sums = ops.sum_by_expert(rows, plan.expert_offsets)
        return y, (sums, plan.expert_offsets.diff())

    @torch.no_grad()
    def update(self, statistics: tuple[Tensor, Tensor]) -> None:
        """Moves the default vectors of the experts that served a token."""
        sums, counts = statistics
        counts = counts.unsqueeze(1)
        vectors = self.widened("default_vectors")
        means = sums.to(vectors.dtype) / counts.clamp(min=1)
        moved = self.decay * vectors + (1 - self.decay) * means
        vectors.copy_(torch.where(counts > 0, moved, vectors))
