"""Routers, one file each: they turn tokens or whole sequences into logits or chosen experts."""

from torchmoe.nn.routers.context_router import ContextRouter, RouterOutput
from torchmoe.nn.routers.cosine_router import CosineRouter
from torchmoe.nn.routers.expert_choice_router import ExpertChoiceRouter
from torchmoe.nn.routers.hash_router import HashRouter
from torchmoe.nn.routers.router import Router
from torchmoe.nn.routers.sequence_router import SequenceRouter

# torchmoe.nn exports these too.
__all__ = [
    "ContextRouter",
    "CosineRouter",
    "ExpertChoiceRouter",
    "HashRouter",
    "Router",
    "RouterOutput",
    "SequenceRouter",
]
