"""Models to be watched, and what was seen of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from torchmoe.monitor import (
    RoutingStatistics,
    Watcher,
    routing_statistics,
)
from torchmoe.nn import Capacity, MoE, Routing

H, INNER, E, K, T = 6, 7, 5, 2, 23
COUNTS = ("tokens_per_expert", "kept_per_expert")
LAYERS = ("blocks.0.moe", "blocks.1.moe")
EPS = torch.finfo(torch.float64).eps


class Block(nn.Module):
    """A residual layer, recomputed in the backward pass if it is checkpointed."""

    def __init__(self, checkpointed: str | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(H)
        self.moe = MoE(H, INNER, E, K, capacity=Capacity(0.8))
        self.checkpointed = checkpointed
        self.calls = 0

    def run(self, x: Tensor) -> Tensor:
        self.calls += 1
        # What tanh saves is recomputed last, so that recomputation runs through the whole layer.
        return x + torch.tanh(self.moe(self.norm(x)).hidden_states)

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed is None:
            return self.run(x)
        return checkpoint(self.run, x, use_reentrant=self.checkpointed == "reentrant")


class Model(nn.Module):
    def __init__(self, checkpointed: str | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(H, H)
        self.blocks = nn.ModuleList(Block(checkpointed) for _ in LAYERS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


def step(model: Callable[[Tensor], Tensor], tokens: int = T) -> None:
    model(torch.randn(tokens, H)).square().mean().backward()


def passes(watcher: Watcher) -> dict[str, int]:
    """How many passes of each layer were kept."""
    totals: dict[str, int] = {}
    for record in watcher.to_records():
        totals[record["layer"]] = totals.get(record["layer"], 0) + record["forwards"]
    return totals


def each(count: int) -> dict[str, int]:
    return dict.fromkeys(LAYERS, count) if count else {}


def seen_routings(model: nn.Module) -> dict[str, list[Routing]]:
    """Every routing of each layer, by hooks of the test's own."""
    found: dict[str, list[Routing]] = {name: [] for name in LAYERS}
    for name, routings in found.items():
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, routings=routings: routings.append(output.routing)
        )
    return found


def over_passes(routings: list[Routing]) -> dict[str, Tensor]:
    """Counts summed, the rest means, by definition."""
    each_pass = [routing_statistics(routing) for routing in routings]
    together = {}
    for name in RoutingStatistics._fields:
        stacked = torch.stack([getattr(statistics, name) for statistics in each_pass])
        together[name] = stacked.sum(0) if name in COUNTS else stacked.double().mean(0)
    return together


def check(actual: dict[str, Any], routings: list[Routing]) -> None:
    for name, expected in over_passes(routings).items():
        value = actual[name]
        if torch.is_tensor(value):
            assert value.dtype == expected.dtype
        else:
            assert type(value) is type(expected.tolist())
            value = torch.tensor(value, dtype=expected.dtype)
        if name in COUNTS:
            assert torch.equal(value, expected), name
        else:
            # Sums in another order, of numbers below 20.
            assert_close(value, expected, rtol=0, atol=20 * len(routings) * EPS, msg=name)
