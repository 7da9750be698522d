"""The layer and its parts: parameters, buffers and configuration around `torchmoe.ops`."""

from torchmoe.nn.assistance import Assistance
from torchmoe.nn.attached_loss import WithAttachedLoss
from torchmoe.nn.capacity import Capacity
from torchmoe.nn.estimators.default_vector import DefaultVector
from torchmoe.nn.estimators.estimator import Estimator
from torchmoe.nn.estimators.exact import Exact
from torchmoe.nn.estimators.gumbel_straight_through import GumbelStraightThrough
from torchmoe.nn.estimators.registry import known_estimators, register_estimator
from torchmoe.nn.estimators.sparsemixer import SparseMixer
from torchmoe.nn.estimators.straight_through import StraightThrough
from torchmoe.nn.estimators.straight_through_dense import StraightThroughDense
from torchmoe.nn.expert_list import ExpertList
from torchmoe.nn.experts import Experts
from torchmoe.nn.gate import Gate
from torchmoe.nn.moe import MoE
from torchmoe.nn.router import Router
from torchmoe.nn.routing import MoEOutput, Routing

__all__ = [
    "Assistance",
    "Capacity",
    "DefaultVector",
    "Estimator",
    "Exact",
    "ExpertList",
    "Experts",
    "Gate",
    "GumbelStraightThrough",
    "MoE",
    "MoEOutput",
    "Router",
    "Routing",
    "SparseMixer",
    "StraightThrough",
    "StraightThroughDense",
    "WithAttachedLoss",
    "known_estimators",
    "register_estimator",
]
