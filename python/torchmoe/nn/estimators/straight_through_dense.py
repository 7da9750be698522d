"""Straight-through over all experts, chosen or not."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from torchmoe.nn.estimators._dense_gradient import attach_dense_gradient
from torchmoe.nn.estimators.estimator import Estimator, ExpertFunction, call_experts
from torchmoe.nn.experts import Experts


class StraightThroughDense(Estimator):
    """The router learns from every expert, including those that a token did not choose.

        forward   y = sum over chosen experts of w_j E_{i_j}(x), as the gate says
        backward  dL/dp_i = G_i = <dL/dy, E_i(x)> for all E experts, selection, capacity and
                  normalisation counting as the identity

    The experts' parameters learn through the chosen experts only, and so does x, except for its
    path through the router (DenseMixer, Yao et al., https://openreview.net/forum?id=4HGIIekCx3). At
    top_k = num_experts and normalize "none" it is the exact gradient.

    The forward pass costs nothing extra. The backward pass computes every expert once for every
    token: 2 T E H I times the number of matrices in an expert (3 gated, 2 plain) in FLOPs. The
    forward and backward passes of the layer itself take three times that, with T K in place of T E.
    With `Experts` one op does this in blocks of 128 tokens; other experts are called once each.
    """

    # The weights' own gradient is not used; this one is defined for every normalisation.
    gate_estimator = "straight_through"
    takes_experts_alone = True

    def combine(
        self,
        x: Tensor,
        logits: Tensor,
        indices: Tensor,
        weights: Tensor,
        experts: ExpertFunction,
        *,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """The chosen experts' weighted outputs, with the dense gradient attached."""
        probs, weights = self.probs(logits, token_mask), weights.detach()
        if isinstance(experts, Experts) and type(experts).forward is Experts.forward:
            return cast(Tensor, experts(x, indices, weights, probs=probs))
        y = call_experts(experts, x, indices, weights)
        return attach_dense_gradient(y, probs, x, experts)

    def surrogate(self, logits: Tensor, selected: Tensor, indices: Tensor) -> Tensor:
        """The scores of all experts: [T, E]."""
        del selected, indices
        return self.probs(logits)
