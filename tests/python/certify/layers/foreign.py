"""Blocks of Transformers, and two makes that none of the others has."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from certify.layers.parts import Expert


class PlainLoop(nn.Module):
    """What a tutorial has: softmax, top-k, a loop over nn.ModuleList."""

    def __init__(self, hidden_size: int = 6, num_experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden_size, 5) for _ in range(num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gate(x)
        weights, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            weight = (weights * (chosen == number)).sum(-1, keepdim=True)
            y = y + weight * expert(x)
        return y, logits


class ReluMoE(nn.Module):
    """ReLU routing (ReMoE, arXiv 2412.14711): the weights are relu(logits)."""

    def __init__(self, hidden_size: int = 6, num_experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden_size, 5) for _ in range(num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = F.relu(self.router(x))
        y = torch.stack([e(x) for e in self.experts], dim=-1) @ weights.unsqueeze(-1)
        return y.squeeze(-1), 0.01 * weights.mean()


class StoredLossMoE(PlainLoop):
    """Returns y alone and keeps its loss, with a graph, as an attribute."""

    aux_loss: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y, logits = super().forward(x)
        scores = logits.softmax(-1).flatten(0, -2)
        counts = scores.topk(self.top_k, dim=-1).indices.flatten().bincount(minlength=4)
        self.aux_loss = 0.04 * (counts / counts.sum() * scores.mean(0)).sum()
        return y


class TransposedMoE(PlainLoop):
    """Its router multiplies from the right, [H, E], and a selection bias is [1, E]."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.ParameterDict({"weight": torch.randn(6, 4)})  # type: ignore[assignment]
        self.register_buffer("selection_bias", 0.3 * torch.randn(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        scores = (x @ self.gate.weight).softmax(-1)
        chosen = (scores + self.selection_bias).topk(2, dim=-1).indices
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            y = y + (scores * (chosen == number).any(-1, keepdim=True))[..., [number]] * expert(x)
        return y


class LossInTrainingMoE(PlainLoop):
    """Returns (y, loss) as a dict, the loss in training alone and with an epsilon."""

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:  # type: ignore[override]
        y, logits = super().forward(x)
        importance = logits.softmax(-1).flatten(0, -2).sum(0)
        loss = 0.01 * importance.var() / (importance.mean().square() + 1e-10)
        return {"output": y, "aux_loss": loss if self.training else None}


class SequencesMoE(PlainLoop):
    """Takes [B, S, H] one sequence after another."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        rows = x.reshape(-1, *x.shape[-2:]).unbind(0)
        return torch.stack([super(SequencesMoE, self).forward(row)[0] for row in rows]).view_as(x)


class HardMoE(PlainLoop):
    """One expert with weight 1, straight-through: its router learns from the score."""

    def forward(self, x: Tensor) -> Tensor:
        return self._mix(x, lambda score: 1 + score - score.detach())

    def surrogate(self, x: Tensor) -> Tensor:
        """The same with the score in the weight's place, less what the score is here."""
        return self._mix(x, lambda score: score + (1 - score).detach())

    def _mix(self, x: Tensor, weigh: Callable[[Tensor], Tensor]) -> Tensor:
        score, chosen = self.gate(x).softmax(-1).max(-1, keepdim=True)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            y = y + (chosen == number) * weigh(score) * expert(x)
        return y


def _mixtral() -> nn.Module:
    from transformers.models.mixtral import modeling_mixtral as mixtral

    config = mixtral.MixtralConfig(
        hidden_size=8, intermediate_size=6, num_local_experts=4, num_experts_per_tok=2
    )
    return _drawn(mixtral.MixtralSparseMoeBlock(config))


def _qwen3() -> nn.Module:
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

    config = qwen3.Qwen3MoeConfig(
        hidden_size=8, moe_intermediate_size=6, num_experts=4, num_experts_per_tok=2
    )
    return _drawn(qwen3.Qwen3MoeSparseMoeBlock(config))


def _olmoe() -> nn.Module:
    from transformers.models.olmoe import modeling_olmoe as olmoe

    config = olmoe.OlmoeConfig(
        hidden_size=8, intermediate_size=6, num_experts=4, num_experts_per_tok=2
    )
    return _drawn(olmoe.OlmoeSparseMoeBlock(config))


def _deepseek() -> nn.Module:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    config = deepseek.DeepseekV3Config(
        hidden_size=8,
        moe_intermediate_size=6,
        n_routed_experts=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
    )
    return _drawn(deepseek.DeepseekV3MoE(config))


def _gpt_oss() -> nn.Module:
    from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

    config = gpt_oss.GptOssConfig(
        hidden_size=8, intermediate_size=6, num_local_experts=4, num_experts_per_tok=2
    )
    return _drawn(gpt_oss.GptOssMLP(config))


def _drawn(block: nn.Module) -> nn.Module:
    """The parameters of a block by itself are as they were in memory."""
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain_loop": PlainLoop,
    "relu": ReluMoE,
    "hard": HardMoE,
    "transposed": TransposedMoE,
    "loss_in_training": LossInTrainingMoE,
    "sequences": SequencesMoE,
    "mixtral": _mixtral,
    "qwen3": _qwen3,
    "olmoe": _olmoe,
    "deepseek": _deepseek,
    "gpt_oss": _gpt_oss,
}
