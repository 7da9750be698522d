"""Layers that loop over their experts, as Mixtral's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd import Function

from certify.layers.parts import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    Expert,
    assignments,
    flatten,
    project,
    wide,
)


class LoopMoE(nn.Module):
    """Softmax top-k routing and a loop over experts, as in Mixtral."""

    takes_mask, returns = True, "y, aux"

    def __init__(
        self,
        hidden: int = HIDDEN,
        intermediate: int = INTERMEDIATE,
        experts: int = EXPERTS,
        top_k: int = TOP_K,
        *,
        normalise: bool = True,
        jitter: float = 0.0,
        balance_coef: float = 0.01,
        z_coef: float = 0.0,
        sequence_wise: bool = False,
        first: int = 0,
        held: int | None = None,
    ) -> None:
        """Holds the experts first .. first + held - 1 only, as one rank of several; all if None."""
        super().__init__()
        self.hidden, self.num_experts, self.top_k = hidden, experts, top_k
        self.normalise, self.jitter, self.sequence_wise = normalise, jitter, sequence_wise
        self.balance_coef, self.z_coef, self.first = balance_coef, z_coef, first
        self.router = nn.Linear(hidden, experts, bias=False)
        held = experts if held is None else held
        self.experts = nn.ModuleList(Expert(hidden, intermediate) for _ in range(held))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output, shaped as x, and the auxiliary loss."""
        y, *routing = self.run(x, mask)
        return y, self.auxiliary(*routing, x.shape)

    def run(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output, the logits [T, E], the experts chosen [T, K] and the real tokens [T]."""
        tokens, valid = flatten(x, mask)
        noisy = self.jittered(tokens)
        logits = self.route(noisy)
        weights, chosen = self.choose(self.probabilities(logits, x.shape))
        chosen = chosen.masked_fill(~valid.unsqueeze(1), -1)
        y = self.combine(self.expert_input(tokens, noisy), weights, chosen)
        return self.finish(y, x), logits, chosen, valid

    def jittered(self, tokens: Tensor) -> Tensor:
        """The router's view of the tokens: times noise in training."""
        if not self.training or self.jitter == 0:
            return tokens
        return tokens * torch.empty_like(tokens).uniform_(1 - self.jitter, 1 + self.jitter)

    def expert_input(self, tokens: Tensor, noisy: Tensor) -> Tensor:
        """What the experts get."""
        return tokens

    def route(self, tokens: Tensor) -> Tensor:
        """Logits [T, E]."""
        return project(tokens, self.router.weight)

    def probabilities(self, logits: Tensor, shape: Sequence[int]) -> Tensor:
        """Scores [T, E]; shape is that of x."""
        return logits.softmax(-1)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts, [T, K] each."""
        weights, chosen = scores.topk(self.top_k, dim=-1)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen

    def combine(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs, in float32 at least."""
        y = torch.zeros_like(wide(tokens))
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == self.first + number)
            out = expert(tokens[token]) * weights[token, slot].unsqueeze(1)
            y = y.index_add(0, token, out.to(y.dtype))
        return y

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """The output in the dtype and the shape of x."""
        return y.to(x.dtype).reshape(x.shape)

    def auxiliary(
        self, logits: Tensor, chosen: Tensor, valid: Tensor, shape: Sequence[int]
    ) -> Tensor:
        """The balancing loss, plus the z-loss if there is one."""
        aux = self.balance_coef * self.balance(logits, chosen, valid, shape)
        if self.z_coef > 0:
            aux = aux + self.z_coef * self.z_loss(logits, valid)
        return aux

    def balance(
        self, logits: Tensor, chosen: Tensor, valid: Tensor, shape: Sequence[int]
    ) -> Tensor:
        """E * sum over experts of (share of assignments) * (mean probability); 1 when even."""
        groups = shape[0] if self.sequence_wise and len(shape) > 2 else 1
        real = valid.reshape(groups, -1, 1)
        number = real.sum(1).clamp(min=1)
        counts = assignments(chosen, self.num_experts).reshape(groups, -1, self.num_experts)
        probabilities = logits.softmax(-1).reshape(groups, -1, self.num_experts)
        share = (counts * real).sum(1) / (number * self.top_k)
        mean = (probabilities * real).sum(1) / number
        return self.num_experts * (share * mean).sum(-1).mean()

    def z_loss(self, logits: Tensor, valid: Tensor) -> Tensor:
        """The mean over tokens of logsumexp(logits) ** 2."""
        return (logits.logsumexp(-1).square() * valid).sum() / valid.sum().clamp(min=1)


class ScaledMoE(LoopMoE):
    """A learned scale for each expert, of either sign, multiplies its weights, as in Gemma 4."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.expert_scale = nn.Parameter(torch.linspace(1.2, -0.6, self.num_experts))

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of either sign."""
        weights, chosen = super().choose(scores)
        return weights * self.expert_scale[chosen], chosen


class NoisyMoE(LoopMoE):
    """Noisy top-k gating (Shazeer et al. 2017) with its smooth load loss."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.noise = nn.Linear(self.hidden, self.num_experts, bias=False)

    def deviation(self, tokens: Tensor) -> Tensor:
        """The noise's standard deviation, [T, E]."""
        return F.softplus(project(tokens, self.noise.weight)) + 0.01

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output and coef * CV^2 of the experts' smooth loads."""
        tokens, valid = flatten(x, mask)
        clean, deviation = self.route(tokens), self.deviation(tokens)
        noisy = clean + torch.randn_like(clean) * deviation if self.training else clean
        weights, chosen = self.choose(noisy.softmax(-1))
        y = self.combine(tokens, weights, chosen.masked_fill(~valid.unsqueeze(1), -1))
        threshold = noisy.topk(self.top_k + 1, dim=-1).values[:, -1:]
        likely = torch.special.ndtr((clean - threshold) / deviation)
        load = (likely * valid.unsqueeze(1)).sum(0)
        spread = load.var(unbiased=False) / load.mean().square().clamp(min=1e-10)
        return self.finish(y, x), self.balance_coef * spread


class StackedMoE(nn.Module):
    """Two layers with residuals; the auxiliary loss is the mean of the layers'."""

    takes_mask, returns = True, "y, aux"

    def __init__(self, layers: int = 2, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LoopMoE(**options) for _ in range(layers))
        self.hidden = self.layers[0].hidden

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output and the mean of the layers' losses."""
        routings = []
        for layer in self.layers:
            y, *routing = layer.run(x, mask)
            x = x + y
            routings.append(routing)
        return x, self.auxiliary(routings, x.shape)

    def auxiliary(self, routings: list[list[Tensor]], shape: Sequence[int]) -> Tensor:
        """Each layer's own loss, then the mean."""
        losses = [
            layer.auxiliary(*routing, shape)
            for layer, routing in zip(self.layers, routings, strict=True)
        ]
        return torch.stack(losses).mean()


class AddAuxGradient(Function):
    """Gives back its first input; its backward adds `scale` to the gradient of aux."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, aux: Tensor, scale: float) -> Tensor:
        """The first input, unchanged."""
        ctx.scale = scale
        ctx.save_for_backward(aux)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """The incoming gradient, and that of the auxiliary loss."""
        (aux,) = ctx.saved_tensors
        return grad, torch.full_like(aux, ctx.scale), None


class InjectedMoE(LoopMoE):
    """Returns y alone; the auxiliary loss's gradient joins in the backward pass, as in Megatron.

    So a backward pass gives the gradient of (grad_y * y).sum() + loss_scale / micro_batches * aux.
    """

    returns = "y"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.loss_scale, self.micro_batches = 1.0, 1

    def set_loss_scale(self, scale: float) -> None:
        """The factor by which the main loss is multiplied before its backward pass."""
        self.loss_scale = scale

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The output."""
        y, aux = super().forward(x, mask)
        return self.inject(y, aux)

    def surrogate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The layer together with its loss, as the backward pass has it."""
        y, aux = LoopMoE.forward(self, x)
        return y, self.loss_scale / self.micro_batches * aux

    def inject(self, y: Tensor, aux: Tensor) -> Tensor:
        """y, with the gradient of aux behind it."""
        return AddAuxGradient.apply(y, aux, self.loss_scale / self.micro_batches)
