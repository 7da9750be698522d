"""The layer and its parts: parameters, buffers and configuration around `torchmoe.ops`."""

from torchmoe.nn.assistance import Assistance
from torchmoe.nn.attached_loss import WithAttachedLoss
from torchmoe.nn.balance import Balance
from torchmoe.nn.capacity import Capacity
from torchmoe.nn.declarations import ExpertsDeclaration, RouterDeclaration
from torchmoe.nn.estimators.default_vector import DefaultVector
from torchmoe.nn.estimators.estimator import Estimator
from torchmoe.nn.estimators.exact import Exact
from torchmoe.nn.estimators.gumbel_straight_through import GumbelStraightThrough
from torchmoe.nn.estimators.registry import known_estimators, register_estimator
from torchmoe.nn.estimators.sparsemixer import SparseMixer
from torchmoe.nn.estimators.straight_through import StraightThrough
from torchmoe.nn.estimators.straight_through_dense import StraightThroughDense
from torchmoe.nn.expert_communication import ExpertCommunication
from torchmoe.nn.expert_list import ExpertList
from torchmoe.nn.experts import Experts
from torchmoe.nn.gate import Gate
from torchmoe.nn.moe import MoE
from torchmoe.nn.routers.context_router import ContextRouter, RouterOutput
from torchmoe.nn.routers.cosine_router import CosineRouter
from torchmoe.nn.routers.expert_choice_router import ExpertChoiceRouter
from torchmoe.nn.routers.hash_router import HashRouter
from torchmoe.nn.routers.router import Router
from torchmoe.nn.routers.sequence_router import SequenceRouter
from torchmoe.nn.routing import Decision, MoEOutput, Routing
from torchmoe.nn.shared_experts import SharedExperts

__all__ = [
    "Assistance",
    "Balance",
    "Capacity",
    "ContextRouter",
    "CosineRouter",
    "Decision",
    "DefaultVector",
    "Estimator",
    "Exact",
    "ExpertChoiceRouter",
    "ExpertCommunication",
    "ExpertList",
    "Experts",
    "ExpertsDeclaration",
    "Gate",
    "GumbelStraightThrough",
    "HashRouter",
    "MoE",
    "MoEOutput",
    "Router",
    "RouterDeclaration",
    "RouterOutput",
    "Routing",
    "SequenceRouter",
    "SharedExperts",
    "SparseMixer",
    "StraightThrough",
    "StraightThroughDense",
    "WithAttachedLoss",
    "known_estimators",
    "register_estimator",
]
