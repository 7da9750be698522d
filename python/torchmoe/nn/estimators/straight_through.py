"""Selection and normalisation count as the identity."""

from __future__ import annotations

import torch
from torch import Tensor

from torchmoe._by_expert import by_expert
from torchmoe.nn.estimators.estimator import Estimator


class StraightThrough(Estimator):
    """Selection and normalisation count as the identity (Bengio et al., arXiv 1308.3432).

        forward   w_j as the gate says
        backward  dL/dp_i = sum of g_j over the slots j with i_j = i, 0 for the other experts

    with g_j = dL/dw_j. It costs nothing. The router learns even if the weights are constant: at
    top_k = 1 with normalize "topk", and with "uniform".
    """

    gate_estimator = "straight_through"

    def surrogate(self, logits: Tensor, selected: Tensor, indices: Tensor) -> Tensor:
        """The scores of the experts that serve the token, before any normalisation: [T, E]."""
        del selected
        served = by_expert(torch.ones_like(indices), indices, self.num_experts)
        return self.probs(logits) * served
