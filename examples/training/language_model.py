"""What this package asks of the model that it trains.

Shapes: B sequences, S bytes each, V different bytes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn

from torchmoe.nn import Experts, MoE, Routing
from training.settings import ModelConfig


class LMOutput(NamedTuple):
    """What one forward pass gives."""

    logits: Tensor  # [B, S, V]
    aux_loss: Tensor  # scalar, summed over the layers, ready to add to the task loss
    routings: list[Routing]  # one per layer, none of a dense model


class LanguageModel(nn.Module):
    """Predicts each next byte from up to `config.context` bytes before it.

    Called with int64 tokens [B, S], S at most `config.context`, it gives an `LMOutput`.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Remembers the settings that shape the model."""
        super().__init__()
        self.config = config

    def loss_per_row(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats per byte of each row: [B]; logits [B, S, V], int64 targets [B, S]."""
        raise NotImplementedError

    @property
    def moes(self) -> list[MoE]:
        """The experts' layer of each block, none of a dense model."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def update(self, routings: list[Routing]) -> None:
        """Lets each layer move what it remembers, once per optimizer step."""
        for moe, routing in zip(self.moes, routings, strict=True):
            moe.update(routing)

    def count_parameters(self) -> tuple[int, int]:
        """All parameters, and those that work on one byte."""
        total = sum(parameter.numel() for parameter in self.parameters())
        idle = 0
        for part in self.modules():
            if isinstance(part, Experts):
                experts = part.num_experts  # 1 of those that every byte visits
                size = sum(parameter.numel() for parameter in part.parameters())
                idle += size - size * min(self.config.top_k, experts) // experts
        return total, total - idle


def bits(nats: float) -> float:
    """The same amount of information in bits."""
    return nats / math.log(2)
