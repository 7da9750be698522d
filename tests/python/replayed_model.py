"""A model whose layers decide by another pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from replayed import random_layer, same
from torchmoe.nn import (
    Decision,
    MoE,
    MoEOutput,
    Routing,
)

LAYERS = ("blocks.0.moe", "blocks.1.moe")


class Block(nn.Module):
    """A residual layer after something that draws, recomputed where it is checkpointed."""

    def __init__(self, moe: MoE, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.moe = moe
        self.use_reentrant = use_reentrant
        self.noise = 0.0
        self.seen: list[Routing] = []

    def run(self, x: Tensor) -> Tensor:
        output: MoEOutput = self.moe(x + self.noise * torch.randn_like(x))
        self.seen.append(output.routing)
        # What tanh saves is recomputed last, so that recomputation runs through the whole layer.
        return x + torch.tanh(output.hidden_states) + 0 * output.aux_loss

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.run(x)
        # With the generator as it is now: the recomputation draws other numbers.
        return checkpoint(self.run, x, use_reentrant=self.use_reentrant, preserve_rng_state=False)


class Model(nn.Module):
    def __init__(
        self,
        build: Callable[[], MoE] = random_layer,
        *,
        calls: int = 1,
        use_reentrant: bool | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(build(), use_reentrant) for _ in LAYERS)
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            for block in self.blocks:
                x = block(x)
        return x

    def pop_seen(self) -> dict[str, list[Routing]]:
        """The routings of every call since the last time, recomputations among them."""
        found = {}
        for name, block in zip(LAYERS, self.blocks, strict=True):
            found[name], block.seen = block.seen, []
        return found


def ids(routings: list[Routing]) -> list[Decision]:
    return [routing.decision for routing in routings]


def check_forced(recorded: dict[str, list[Routing]], forced: dict[str, list[Routing]]) -> None:
    for name in LAYERS:
        assert len(recorded[name]) == len(forced[name]) > 0
        for one, other in zip(recorded[name], forced[name], strict=True):
            assert same(one.decision, other.decision), name
