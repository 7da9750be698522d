"""Bugs in the weights of the slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd import Function

from certify.layers.loop import LoopMoE, ScaledMoE
from certify.layers.parts import wide
from certify.mutants.registry import mutant


@mutant(
    "top1_weight_always_one",
    base="loop_top1",
    kind="one expert per token and normalised weights: the router gets no gradient",
    source="https://github.com/jingyaogong/minimind/issues/858",
    report="With one expert per token the normalised weight is always 1, so that the router gets "
    "no gradient from the main loss.",
    use="any backward pass; only for K = 1",
)
class Top1WeightAlwaysOne(LoopMoE):
    """Divides the one weight by itself."""

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """A weight of 1."""
        weights, chosen = super().choose(scores)
        return weights / weights.sum(-1, keepdim=True), chosen


@mutant(
    "top1_normalised_over_tokens",
    base="loop_top1",
    kind="weights of shape [T] normalised over the tokens of the batch instead of the choices",
    source="https://github.com/databricks/megablocks/pull/87",
    report="For top_k = 1 the weights came as [tokens], and the norm over the last dimension was "
    "taken over all the tokens.",
    use="any forward pass of more than one token; only for K = 1",
)
class Top1NormalisedOverTokens(LoopMoE):
    """The norm's last dimension is the tokens'."""

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Weights that sum to 1 over the batch."""
        weights, chosen = scores.max(-1)
        weights = weights / weights.sum(-1, keepdim=True)
        return weights.unsqueeze(1), chosen.unsqueeze(1)


@mutant(
    "router_weights_detached",
    base="loop",
    kind="routing weights without a gradient",
    source="kind reported, e.g. https://github.com/TIML-Group/Robust-MoE-Dual-Model/issues/2",
    report="The router's grad is None after loss.backward().",
    use="any backward pass",
)
class RouterWeightsDetached(LoopMoE):
    """Weights cut off from the router."""

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Detached weights."""
        weights, chosen = super().choose(scores)
        return weights.detach(), chosen


@mutant(
    "softmax_over_the_sequence",
    base="loop",
    kind="softmax over the wrong dimension: over tokens, for inputs of three dimensions",
    source="kind reported, e.g. https://github.com/huggingface/transformers/pull/42114",
    report="The softmax of the router is taken over dim=1, which is right only while the logits "
    "are flattened to two dimensions.",
    use="any forward pass of x [B, S, H]; right for x [T, H]",
)
class SoftmaxOverTheSequence(LoopMoE):
    """dim=1 of logits that were not flattened."""

    def probabilities(self, logits: Tensor, shape: Sequence[int]) -> Tensor:
        """Softmax over dim 1 in the shape of x."""
        return logits.reshape(*shape[:-1], -1).softmax(1).reshape(logits.shape)


@mutant(
    "router_in_the_layers_dtype",
    base="loop",
    kind="the router's product and softmax in bfloat16 instead of float32",
    source="https://github.com/vllm-project/vllm/pull/14027",
    report="The gate's logits and their softmax were computed in bfloat16 where the models compute "
    "them in float32.",
    use="only in bfloat16",
)
class RouterInTheLayersDtype(LoopMoE):
    """Logits and scores in the dtype of x."""

    def route(self, tokens: Tensor) -> Tensor:
        """Logits rounded to the layer's dtype."""
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens, self.router.weight)


@mutant(
    "scores_rounded_before_top_k",
    base="loop",
    kind="scores cast to bfloat16 before the choice: near scores tie and another expert is chosen",
    source="https://github.com/ViperEkura/AstrAI/pull/57",
    report="The whole softmax was cast to the activations' dtype before top-k, so that close "
    "probabilities tied and another set of experts was chosen.",
    use="only in bfloat16",
)
class ScoresRoundedBeforeTopK(LoopMoE):
    """A float32 softmax, cast at once."""

    def probabilities(self, logits: Tensor, shape: Sequence[int]) -> Tensor:
        """Scores in the layer's dtype."""
        return logits.softmax(-1).to(self.router.weight.dtype)


@mutant(
    "router_under_autocast",
    base="loop",
    kind="a router meant to run in float32 that autocast runs in bfloat16",
    source="kind reported, e.g. https://github.com/marin-community/marin/pull/4234",
    report="The router's product stayed in the compute dtype; it had to be raised to float32 "
    "before top-k, softmax and statistics.",
    use="only under torch.autocast",
)
class RouterUnderAutocast(LoopMoE):
    """Casts its inputs to float32, which autocast undoes."""

    def route(self, tokens: Tensor) -> Tensor:
        """Logits of whatever dtype autocast likes."""
        return wide(F.linear(wide(tokens), wide(self.router.weight)))


@mutant(
    "weights_applied_twice",
    base="loop",
    kind="routing weights applied to the experts' input and again to their output",
    source="https://github.com/vllm-project/vllm/pull/43694",
    report="Paths that had already applied the weights to the input applied them again on the "
    "output side.",
    use="any forward pass",
    needs_reference=True,
)
class WeightsAppliedTwice(LoopMoE):
    """w * expert(w * x)."""

    def combine(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Weights on both sides."""
        y = torch.zeros_like(wide(tokens))
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            weight = weights[token, slot].unsqueeze(1)
            out = expert(tokens[token] * weight.to(tokens.dtype)) * weight
            y = y.index_add(0, token, out.to(y.dtype))
        return y


@mutant(
    "weights_on_the_input",
    base="loop",
    kind="routing weights applied before the nonlinear expert instead of after it",
    source="https://github.com/labmlai/annotated_deep_learning_paper_implementations/issues/95",
    report="The routing probability was multiplied with the experts' input and not their output.",
    use="any forward pass",
    needs_reference=True,
)
class WeightsOnTheInput(LoopMoE):
    """expert(w * x)."""

    def combine(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Weights on the input."""
        y = torch.zeros_like(wide(tokens))
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            weight = weights[token, slot].unsqueeze(1).to(tokens.dtype)
            y = y.index_add(0, token, expert(tokens[token] * weight).to(y.dtype))
        return y


class GateGradientFromIdentity(Function):
    """Identity on the activation; its backward makes the weight's gradient out of <A, dA> / w."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor, weight: Tensor) -> Tensor:
        """The activation, unchanged."""
        ctx.save_for_backward(inner, weight)
        return inner.view_as(inner)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The bug: the weight that divides is clamped to positive values."""
        inner, weight = ctx.saved_tensors
        dot = (wide(inner) * wide(grad)).sum(-1)
        return grad, (dot / wide(weight).clamp(min=1e-12)).to(weight.dtype)


@mutant(
    "gate_gradient_of_negative_weights",
    base="scaled",
    kind="the weights' gradient from an identity that divides by the weight clamped above 0",
    source="https://github.com/unslothai/unsloth-zoo/pull/858",
    report="A review: the division by gate.clamp_min(1e-12) gives a gradient of the wrong size "
    "and sign where a routing weight is negative.",
    use="any backward pass; only for slots with a negative weight",
)
class GateGradientOfNegativeWeights(ScaledMoE):
    """The combine's own multiplication is detached."""

    def combine(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The gradient of the weights flows through the identity alone."""
        y = torch.zeros_like(wide(tokens))
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            weight = weights[token, slot]
            inner = GateGradientFromIdentity.apply(expert.inner(tokens[token]), weight)
            out = expert.down(inner) * weight.detach().unsqueeze(1)
            y = y.index_add(0, token, out.to(y.dtype))
        return y
