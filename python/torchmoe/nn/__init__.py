"""The layer and its parts: parameters, buffers and configuration around `torchmoe.ops`."""

from torchmoe.nn.attached_loss import WithAttachedLoss
from torchmoe.nn.capacity import Capacity
from torchmoe.nn.estimator import (
    Estimator,
    Exact,
    StraightThrough,
    known_estimators,
    register_estimator,
)
from torchmoe.nn.expert_list import ExpertList
from torchmoe.nn.experts import Experts
from torchmoe.nn.gate import Gate
from torchmoe.nn.moe import MoE
from torchmoe.nn.router import Router
from torchmoe.nn.routing import MoEOutput, Routing

__all__ = [
    "Capacity",
    "Estimator",
    "Exact",
    "ExpertList",
    "Experts",
    "Gate",
    "MoE",
    "MoEOutput",
    "Router",
    "Routing",
    "StraightThrough",
    "WithAttachedLoss",
    "known_estimators",
    "register_estimator",
]
