"""The routers that the example models can choose from, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from torchmoe.nn import (
    CosineRouter,
    ExpertChoiceRouter,
    HashRouter,
    Router,
    SequenceRouter,
)
from torchmoe.nn.declarations import declared_by_router

#: From hidden size, number of experts, experts per token and the layer's number to a router.
Make = Callable[[int, int, int, int], nn.Module]


def pooled(pooling: str) -> Make:
    """One decision for each sequence."""
    return lambda size, experts, _top_k, _layer: SequenceRouter(
        Router(size, experts), pooling=pooling
    )


def is_pooled(name: str) -> bool:
    """Whether the router of this name decides once for each sequence."""
    return name.startswith("sequence_")


ROUTERS: Mapping[str, Make] = {
    "linear": lambda size, experts, _top_k, _layer: Router(size, experts),
    "cosine": lambda size, experts, _top_k, _layer: CosineRouter(size, experts),
    "hash": lambda _size, experts, top_k, layer: HashRouter(experts, top_k, seed=layer),
    "sequence_first": pooled("first"),
    "sequence_mean": pooled("mean"),
    "sequence_attention": pooled("attention"),
    "expert_choice": lambda size, experts, top_k, _layer: ExpertChoiceRouter(
        Router(size, experts), top_k, among="sequence"
    ),
}
READS_TOKEN_IDS = ("hash",)  # as router_input, the others none


def looks_ahead(name: str) -> str | None:
    """Why a router of this name may decide by later tokens; None if it never does."""
    with torch.device("meta"):
        return declared_by_router(ROUTERS[name](1, 1, 1, 0)).looks_ahead
