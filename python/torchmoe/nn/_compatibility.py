"""Which parts of a layer go together. A message reads `MoE: argument must ..., got ...`."""

from __future__ import annotations

from torch import nn

from torchmoe.nn.estimators.estimator import Estimator
from torchmoe.nn.gate import Gate
from torchmoe.nn.routers.context_router import ContextRouter


def check_part(argument: str, part: object, **sizes: int) -> None:
    """Raises ValueError if a replaced part says that it was made for other sizes."""
    for name, expected in sizes.items():
        actual = getattr(part, name, expected)
        if actual != expected:
            raise ValueError(f"MoE: {argument} must have {name} {expected}, got {actual}")


def check_groups(gate: Gate, num_experts: int, top_k: int) -> None:
    """Raises ValueError where the groups do not fit the layer's sizes."""
    if num_experts % gate.num_groups:
        raise ValueError(
            f"MoE: gate.num_groups must divide num_experts {num_experts}, got {gate.num_groups}"
        )
    offered = gate.top_groups * num_experts // gate.num_groups
    if top_k > offered:
        raise ValueError(
            f"MoE: top_k must be in [1, {offered}], the experts of gate.top_groups "
            f"{gate.top_groups}, got {top_k}"
        )


def check_usage(router: nn.Module, reader: str | None) -> None:
    """Raises ValueError unless the router keeps usage for whatever reads it."""
    if reader is not None and getattr(router, "usage", None) is None:
        raise ValueError(
            f"MoE: router must keep usage for {reader}, as Router(track_usage=True) does, "
            "got one without"
        )


def check_choice_of_experts(
    router: nn.Module, gate: Gate, estimator: Estimator, selection_bias_rate: float
) -> None:
    """Raises ValueError where two parts would choose the experts, each in its own way."""
    name = type(router).__name__
    chooses = getattr(router, "chooses", False)  # HashRouter, too, in its logits
    if chooses and selection_bias_rate > 0:
        raise ValueError(
            f"MoE: selection_bias_rate must be 0 with {name}, which chooses the experts itself, "
            f"got {selection_bias_rate}"
        )
    if chooses and gate.num_groups > 1:
        raise ValueError(
            f"MoE: gate.num_groups must be 1 with {name}, which chooses the experts itself, "
            f"got {gate.num_groups}"
        )
    if not isinstance(router, ContextRouter):
        return
    if estimator.draws and (chooses or router.decides_for != "token"):
        reason = "which chooses the experts itself"
        if not chooses:
            reason = f"which decides once for each {router.decides_for}"
        raise ValueError(
            f"MoE: gate.estimator must not draw each token's experts with {name}, {reason}, "
            f"got {type(estimator).__name__}"
        )


def check_experts(experts: object, estimator: Estimator) -> None:
    """Raises ValueError where an estimator asks for one expert's output, and there is no such."""
    if estimator.takes_experts_alone and getattr(experts, "mixes_slots", False):
        raise ValueError(
            "MoE: gate.estimator must not need the output of each expert alone with "
            f"{type(experts).__name__}, where it depends on the token's other experts, "
            f"got {type(estimator).__name__}"
        )
