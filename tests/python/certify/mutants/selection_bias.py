"""Bugs in selection biases, groups and shared experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from certify.layers.parts import assignments
from certify.layers.selection_bias import BiasMoE
from certify.mutants.registry import mutant


@mutant(
    "biased_scores_as_weights",
    base="bias",
    kind="the selection bias enters the routing weights",
    source="https://github.com/huggingface/transformers/pull/41647",
    report="A refactoring took the weights from the scores with the bias added; the bias belongs "
    "to the choice alone.",
    use="any forward pass with a bias other than 0",
    needs_reference=True,
)
class BiasedScoresAsWeights(BiasMoE):
    """Weights of the tensor that was chosen from."""

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Biased weights."""
        biased = scores + self.expert_bias
        chosen = self.select(biased)
        return self.weigh(biased.gather(1, chosen)), chosen


@mutant(
    "closed_groups_filled_with_zero",
    base="bias_negative",
    kind="masked groups have score 0, which beats negative scores",
    source="https://github.com/huggingface/transformers/issues/45440",
    report="masked_fill with 0.0 is no floor once biases make scores negative; experts of masked "
    "groups are chosen.",
    use="the choice of experts with negative biases",
    needs_reference=True,
)
class ClosedGroupsFilledWithZero(BiasMoE):
    """0 in place of -inf."""

    def hide(self, biased: Tensor, closed: Tensor) -> Tensor:
        """Scores of 0 for closed groups."""
        return biased.masked_fill(closed, 0.0)


@mutant(
    "groups_scored_by_their_best",
    base="bias",
    kind="a group's score is its best expert's, not the sum of its two best",
    source="https://github.com/vllm-project/vllm/pull/13474",
    report="With a bias the groups must be ranked by the sum of their top-2 scores.",
    use="the choice of experts",
    needs_reference=True,
)
class GroupsScoredByTheirBest(BiasMoE):
    """max in place of a sum."""

    def group_scores(self, biased: Tensor) -> Tensor:
        """The best member's score."""
        return biased.reshape(len(biased), self.groups, -1).amax(-1)


@mutant(
    "group_mask_tiled",
    base="bias",
    kind="the mask of groups repeated as a whole instead of element by element",
    source="https://github.com/tenstorrent/tt-metal/pull/43401",
    report="repeat gives [g0, g1, g0, g1] where repeat_interleave gives [g0, g0, g1, g1]; the "
    "training loss does not show it.",
    use="the choice of experts",
    needs_reference=True,
)
class GroupMaskTiled(BiasMoE):
    """repeat in place of repeat_interleave."""

    def spread(self, open_groups: Tensor) -> Tensor:
        """A tiled mask."""
        return open_groups.repeat(1, self.num_experts // self.groups)


@mutant(
    "normalised_without_epsilon",
    base="bias",
    kind="0 / 0 when all chosen scores underflow",
    source="https://github.com/sgl-project/sglang/pull/31017",
    report="With sigmoid scores and a selection bias all chosen scores can be exactly 0, and the "
    "normalisation without its epsilon gives NaN.",
    use="any pass with logits below -104 in float32",
)
class NormalisedWithoutEpsilon(BiasMoE):
    """A bare division."""

    def weigh(self, weights: Tensor) -> Tensor:
        """Weights that may be NaN."""
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.scaling


@mutant(
    "weights_not_normalised",
    base="bias",
    kind="the chosen weights are not normalised",
    source="https://github.com/pytorch/torchtitan/issues/1448",
    report="The top-k scores were not normalised although the checkpoint needs it, and the "
    "gradients' norm was far too high.",
    use="any forward pass",
    needs_reference=True,
)
class WeightsNotNormalised(BiasMoE):
    """Scaling alone."""

    def weigh(self, weights: Tensor) -> Tensor:
        """Scores times the scaling."""
        return weights * self.scaling


@mutant(
    "scaling_only_if_normalised",
    base="bias_unnormalised",
    kind="a scaling factor nested inside the branch of another option",
    source="https://github.com/sgl-project/sglang-jax/pull/1282",
    report="The scaling sits inside `if renormalize`, so that it is skipped without normalisation.",
    use="any forward pass with normalise=False",
    needs_reference=True,
)
class ScalingOnlyIfNormalised(BiasMoE):
    """No scaling without normalisation."""

    def weigh(self, weights: Tensor) -> Tensor:
        """Weights, perhaps unscaled."""
        return super().weigh(weights) if self.normalise else weights


@mutant(
    "scaling_applied_twice",
    base="bias",
    kind="a scaling factor in the weights and again in the output",
    source="https://github.com/sgl-project/sglang/pull/35152",
    report="The factor is inside the top-k weights already and the epilogue multiplies by it "
    "again.",
    use="any forward pass",
    needs_reference=True,
)
class ScalingAppliedTwice(BiasMoE):
    """The square of the scaling."""

    def combine(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The sum, scaled again."""
        return super().combine(tokens, weights, chosen) * self.scaling


@mutant(
    "top1_reads_an_empty_buffer",
    base="bias_top1",
    kind="the path for scaled outputs reads a buffer that top-1 never fills",
    source="https://github.com/sgl-project/sglang/pull/40187",
    report="For top-1 the kernel writes the output directly, and the scaling path then reduces a "
    "buffer that was never filled and overwrites it.",
    use="any forward pass; only for K = 1 with a scaling other than 1",
)
class Top1ReadsAnEmptyBuffer(BiasMoE):
    """The right sum is computed and replaced by an empty one."""

    def combine(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """An unfilled buffer, here 0."""
        y = super().combine(tokens, weights, chosen)
        return torch.zeros_like(y) if self.top_k == 1 and self.scaling != 1 else y


@mutant(
    "shared_gate_unused",
    base="bias",
    kind="the shared expert's gate is a parameter that nothing uses",
    source="https://github.com/NousResearch/torchtitan/pull/36",
    report="shared_gate was initialised and loaded and never used in the forward pass.",
    use="the output, and the gradient of shared_gate",
)
class SharedGateUnused(BiasMoE):
    """A shared expert without its gate."""

    def join(self, routed: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
        """The sum of both, ungated."""
        return routed + self.shared(tokens) * valid.unsqueeze(1)


@mutant(
    "shared_expert_left_out",
    base="bias",
    kind="the layer returns its routed experts' output alone",
    source="https://github.com/divyamakkar0/JAXformer/issues/21",
    report="The layer returns the routed experts' outputs and not the sum with the shared ones.",
    use="the output, and the gradients of the shared expert",
)
class SharedExpertLeftOut(BiasMoE):
    """No shared expert."""

    def join(self, routed: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
        """The routed part."""
        return routed


@mutant(
    "counts_in_evaluation",
    base="bias",
    kind="token counts that move the bias include evaluation",
    source="https://github.com/pytorch/torchtitan/pull/4148",
    report="The forward pass counts tokens in eval mode too, and validation leaks into the next "
    "update of the bias; no_grad does not prevent it.",
    use="tokens_per_expert after a forward pass in eval mode",
)
class CountsInEvaluation(BiasMoE):
    """Counts in every mode."""

    def count(self, chosen: Tensor, valid: Tensor) -> None:
        """Add to the counts."""
        if not self.recomputing():
            with torch.no_grad():
                self.tokens_per_expert += assignments(chosen[valid], self.num_experts).sum(0)


@mutant(
    "counts_twice_in_recomputation",
    base="bias",
    kind="token counts doubled when a checkpoint runs the layer again",
    source="https://github.com/NVIDIA-NeMo/Automodel/pull/3247",
    report="The replay of a checkpoint adds to the cumulative expert load a second time.",
    use="tokens_per_expert after a backward pass through torch.utils.checkpoint",
)
class CountsTwiceInRecomputation(BiasMoE):
    """Does not know a recomputation."""

    def recomputing(self) -> bool:
        """Never."""
        return False


@mutant(
    "padding_counted_for_the_bias",
    base="bias",
    kind="tokens that the mask leaves out counted for the selection bias",
    source="https://github.com/pytorch/torchtitan/pull/4594",
    report="Padding masks had to be brought into the token counts of load balancing.",
    use="tokens_per_expert after a training forward pass with a mask",
)
class PaddingCountedForTheBias(BiasMoE):
    """Counts every token."""

    def count(self, chosen: Tensor, valid: Tensor) -> None:
        """Add to the counts."""
        super().count(chosen, torch.ones_like(valid))


@mutant(
    "bias_update_leaves_the_buffer",
    base="bias",
    kind="a buffer replaced instead of changed: references to it go stale",
    source="https://github.com/pytorch/torchtitan/issues/1222",
    report="expert_bias was reassigned at each update, so that checkpoints held the first tensor, "
    "all zeros.",
    use="a state_dict taken before update_bias(), read after it",
)
class BiasUpdateLeavesTheBuffer(BiasMoE):
    """b = b + step."""

    @torch.no_grad()
    def update_bias(self) -> None:
        """A new tensor for the bias."""
        before = self.expert_bias
        self.expert_bias = before.clone()
        super().update_bias()


@mutant(
    "bias_not_in_the_state_dict",
    base="bias",
    kind="the selection bias is not saved",
    source="kind reported, e.g. https://github.com/deepspeedai/DeepSpeed/pull/8369",
    report="Replacing layers silently dropped e_score_correction_bias where it is a buffer.",
    use="a layer loaded from another's state_dict",
)
class BiasNotInTheStateDict(BiasMoE):
    """A buffer that is not persistent."""

    def make_state(self, bias: Tensor) -> None:
        """The bias outside the state dict."""
        super().make_state(bias)
        self.register_buffer("expert_bias", bias, persistent=False)


@mutant(
    "bias_in_bfloat16",
    base="bias_negative",
    kind="the selection bias follows the layer into bfloat16, where small steps are lost",
    source="https://github.com/NVIDIA/Megatron-LM/issues/1482",
    report="expert_bias is registered in float32 and found in bfloat16 in training, although it "
    "moves in very small steps.",
    use="update_bias() after .to(torch.bfloat16)",
)
class BiasInBfloat16(BiasMoE):
    """nn.Module's own _apply."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Every floating buffer is cast."""
        return nn.Module._apply(self, fn, recurse)


@mutant(
    "counts_in_bfloat16",
    base="bias",
    kind="token counts in bfloat16: whole numbers above 256 are rounded",
    source="https://github.com/NVIDIA/Megatron-LM/pull/7081",
    report="The counts were a floating buffer that became bfloat16, and rounding turned the sign "
    "of an update of the bias.",
    use="tokens_per_expert above 256 tokens; only in bfloat16",
)
class CountsInBfloat16(BiasMoE):
    """A floating buffer."""

    def make_state(self, bias: Tensor) -> None:
        """Counts that a cast rounds."""
        super().make_state(bias)
        self.register_buffer("tokens_per_expert", torch.zeros(len(bias)))


@mutant(
    "bias_moves_with_every_micro_batch",
    base="bias",
    kind="the selection bias is updated inside the forward pass",
    source="https://github.com/pytorch/torchtitan/pull/1304",
    report="The original implementation updates the bias at each micro-batch of an accumulated "
    "step.",
    use="two training forward passes before one update",
)
class BiasMovesWithEveryMicroBatch(BiasMoE):
    """A forward pass that changes the next one."""

    def count(self, chosen: Tensor, valid: Tensor) -> None:
        """Count and update."""
        super().count(chosen, valid)
        if self.training:
            self.update_bias()


@mutant(
    "bias_never_moves",
    base="bias",
    kind="a selection bias declared as a parameter, which gets no gradient and no update",
    source="https://github.com/AI-Hypercomputer/maxtext/issues/2494",
    report="The routing bias is called learnable and is never updated: it enters top-k alone and "
    "gets no gradient.",
    use="the bias after training steps",
)
class BiasNeverMoves(BiasMoE):
    """A parameter in place of a buffer, left to the optimizer."""

    def make_state(self, bias: Tensor) -> None:
        """The bias as a parameter."""
        super().make_state(bias)
        del self.expert_bias
        self.expert_bias = nn.Parameter(bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """As any parameter."""
        return nn.Module._apply(self, fn, recurse)

    @torch.no_grad()
    def update_bias(self) -> None:
        """The counts alone."""
        self.tokens_per_expert.zero_()


@mutant(
    "counts_shared_by_all_layers",
    base="bias",
    kind="a mutable default argument: every layer counts into the same state",
    source="kind reported, e.g. https://github.com/vllm-project/tpu-inference/pull/3101",
    report="Mutable default dictionaries were changed and leaked state across all layers built "
    "with the default.",
    use="tokens_per_expert of one layer after a forward pass of another",
)
class CountsSharedByAllLayers(BiasMoE):
    """One tensor of counts for the class."""

    def make_state(self, bias: Tensor, counts: dict[int, Tensor] = {}) -> None:  # noqa: B006
        """Counts out of the default argument."""
        super().make_state(bias)
        shared = counts.setdefault(len(bias), torch.zeros(len(bias), dtype=torch.int64))
        self.register_buffer("tokens_per_expert", shared)
