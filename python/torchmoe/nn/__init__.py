"""The layer and its parts: parameters, buffers and configuration around `torchmoe.ops`."""

from torchmoe.nn import routers
from torchmoe.nn.assistance import Assistance
from torchmoe.nn.attached_loss import WithAttachedLoss
from torchmoe.nn.balance import Balance
from torchmoe.nn.capacity import Capacity
from torchmoe.nn.declarations import ExpertsDeclaration, RouterDeclaration
from torchmoe.nn.estimators import registry as _registry
from torchmoe.nn.estimators.registry import *  # noqa: F403 (its __all__)
from torchmoe.nn.expert_communication import ExpertCommunication
from torchmoe.nn.expert_list import ExpertList
from torchmoe.nn.experts import Experts
from torchmoe.nn.gate import Gate
from torchmoe.nn.moe import MoE
from torchmoe.nn.routers import *  # noqa: F403 (its __all__)
from torchmoe.nn.routing import Decision, MoEOutput, Routing
from torchmoe.nn.shared_experts import SharedExperts

__all__ = [
    "Assistance",
    "Balance",
    "Capacity",
    "Decision",
    "ExpertCommunication",
    "ExpertList",
    "Experts",
    "ExpertsDeclaration",
    "Gate",
    "MoE",
    "MoEOutput",
    "RouterDeclaration",
    "Routing",
    "SharedExperts",
    "WithAttachedLoss",
]
__all__ += _registry.__all__
__all__ += routers.__all__
__all__.sort()
