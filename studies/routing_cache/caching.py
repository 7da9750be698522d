"""Caches for the layers of a model, and what they are seen to do.

Shapes: R gate inputs of a call, of G numbers each; L layers of a model; M entries of a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from torchmoe import RoutingCache, ops
from torchmoe.nn import MoE, Routing
from training.figures import Values

SAMPLE = 256  # gate inputs whose keys are counted


def put_caches(model: nn.Module, make: Callable[[], RoutingCache]) -> list[RoutingCache]:
    """Gives each experts' layer of the model a cache, in their order."""
    caches = []
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.cache = make()
            caches.append(layer.cache)
    return caches


def update(caches: Sequence[RoutingCache], routings: Sequence[Routing]) -> None:
    """Moves the caches of all layers by one call."""
    for cache, routing in zip(caches, routings, strict=True):
        cache.update(routing)


def entries_of(routing: Routing) -> Tensor:
    """The entry that each gate input has found, int64 [R]; -1 = none."""
    rows = routing.details["gate_input"].flatten(0, -2).shape[0]
    return routing.details["cache_hit"].view(rows, -1).amax(dim=1)


def compared(cache: RoutingCache, gate_input: Tensor) -> float:
    """How many keys a lookup compares with a gate input, the mean over a sample of the rows.

    They are those that share a signature with it.

    Args:
        cache: one that holds an entry.
        gate_input: [R, G].
    """
    state = cache.state_dict()
    rows = torch.linspace(0, len(gate_input) - 1, min(SAMPLE, len(gate_input))).long()
    own = ops.cache_signatures(gate_input[rows], state["planes"])  # [rows, tables]
    keys = state["key_signatures"]  # [M, tables]
    shared = (own.unsqueeze(1) == keys) & (keys >= 0)  # [rows, M, tables]
    return float(shared.any(dim=2).sum(dim=1).double().mean())


class Tally:
    """What the caches of a model find, call by call."""

    def __init__(self, caches: Sequence[RoutingCache]) -> None:
        """Starts with nothing seen."""
        self._caches = caches
        self._lookups, self._hits, self._agreed = np.zeros((3, len(caches)))
        self.complete = np.zeros(len(caches))
        """[L], calls in which every gate input has found an entry."""

    def add(self, routings: Sequence[Routing]) -> None:
        """Counts a call, before the caches are updated by it."""
        for layer, (cache, routing) in enumerate(zip(self._caches, routings, strict=True)):
            entries = entries_of(routing)
            hits = int((entries >= 0).sum())
            self._lookups[layer] += len(entries)
            self._hits[layer] += hits
            self.complete[layer] += hits == len(entries)
            if hits:
                self._agreed[layer] += hits * cache.second_look(routing)

    @property
    def hit_rate(self) -> Values:
        """[L], the share of the gate inputs that find an entry."""
        return self._hits / self._lookups

    @property
    def agreement(self) -> Values:
        """[L], the share of a hit's experts that the router would have chosen; NaN without one."""
        none = np.full_like(self._hits, np.nan)
        return np.divide(self._agreed, self._hits, out=none, where=self._hits > 0)
