"""Routers: how tokens, or whole sequences, become logits or a choice of experts; one file each."""

from torchmoe.nn.routers.context_router import ContextRouter, RouterOutput
from torchmoe.nn.routers.cosine_router import CosineRouter
from torchmoe.nn.routers.expert_choice_router import ExpertChoiceRouter
from torchmoe.nn.routers.hash_router import HashRouter
from torchmoe.nn.routers.router import Router
from torchmoe.nn.routers.sequence_router import SequenceRouter

# What torchmoe.nn exports too.
__all__ = [
    "ContextRouter",
    "CosineRouter",
    "ExpertChoiceRouter",
    "HashRouter",
    "Router",
    "RouterOutput",
    "SequenceRouter",
]
