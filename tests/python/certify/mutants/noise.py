"""Bugs in what is drawn."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from certify.layers.dispatch import DispatchMoE
from certify.layers.loop import LoopMoE, NoisyMoE
from certify.mutants.registry import mutant


@mutant(
    "jitter_reaches_the_experts",
    base="loop_jitter",
    kind="the router's jitter changes what the experts get",
    source="https://github.com/huggingface/transformers/issues/33969",
    report="The jitter multiplied the hidden states in place, so that the experts got the noisy "
    "input too.",
    use="training mode with jitter",
)
class JitterReachesTheExperts(LoopMoE):
    """Experts run on noisy tokens."""

    def expert_input(self, tokens: Tensor, noisy: Tensor) -> Tensor:
        """The noisy tokens."""
        return noisy


@mutant(
    "jitter_in_evaluation",
    base="loop_jitter",
    kind="routing noise in evaluation",
    source="https://github.com/eduardzamfir/MoCE-IR/issues/19",
    report="The noise is always added to the logits, so that routing is random in inference too.",
    use="eval mode: two equal calls differ",
)
class JitterInEvaluation(LoopMoE):
    """Does not ask for the mode."""

    def jittered(self, tokens: Tensor) -> Tensor:
        """Noise in every mode."""
        return tokens * torch.empty_like(tokens).uniform_(1 - self.jitter, 1 + self.jitter)


@mutant(
    "load_loss_nan_in_evaluation",
    base="noisy",
    kind="the smooth load loss divides by the noise's deviation, which is 0 in evaluation",
    source="https://github.com/laekov/fastmoe/issues/180",
    report="noise_stddev is multiplied by self.training and so is 0 in inference, where the load "
    "becomes NaN.",
    use="the auxiliary loss in eval mode",
)
class LoadLossNanInEvaluation(NoisyMoE):
    """A deviation of 0 in evaluation."""

    def deviation(self, tokens: Tensor) -> Tensor:
        """Times the mode."""
        return super().deviation(tokens) * self.training


@mutant(
    "noise_drawn_again_in_recomputation",
    base="dispatch_recompute",
    kind="noise drawn anew when a checkpoint runs the layer again: another routing's gradient",
    source="https://github.com/allenai/OLMo-core/pull/828",
    report="A review: the generator's state was not kept for a router with jitter, so that the "
    "recomputation routes with fresh noise and gives another assignment's gradients.",
    use="a backward pass in training mode, the seed set before the forward pass",
)
class NoiseDrawnAgainInRecomputation(DispatchMoE):
    """The generator's state is not restored."""

    def recomputed(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """A checkpoint that draws anew."""
        return checkpoint(self.body, x, mask, use_reentrant=False, preserve_rng_state=False)
