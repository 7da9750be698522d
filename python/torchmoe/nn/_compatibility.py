"""Which parts of a layer go together. A message reads `MoE: argument must ..., got ...`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from torchmoe.nn.assistance import Assistance
from torchmoe.nn.capacity import Capacity
from torchmoe.nn.estimators.estimator import Estimator
from torchmoe.nn.gate import Gate


def check_part(argument: str, part: object, **settings: object) -> None:
    """Raises ValueError if a replaced part says that it was made for other settings."""
    for name, expected in settings.items():
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


def check_backup_size(backup: Sequence[int] | None, num_experts: int) -> None:
    """Raises ValueError unless the capacity's backup, where there is one, is for these experts."""
    if backup is not None and len(backup) != num_experts:
        raise ValueError(
            f"MoE: capacity.backup must have {num_experts} entries, one for each expert, "
            f"got {len(backup)}"
        )


def check_usage(router: nn.Module, reader: str | None) -> None:
    """Raises ValueError unless the router keeps usage for whatever reads it, and can move it."""
    if getattr(router, "usage", None) is None:
        if reader is not None:
            raise ValueError(
                f"MoE: router must keep usage for {reader}, as Router(track_usage=True) does, "
                "got one without"
            )
    elif not callable(getattr(router, "update", None)):
        raise ValueError(
            "MoE: router must have update(tokens_per_expert, num_slots) where it has usage, "
            f"got {type(router).__name__} without"
        )


def check_choosing(
    router: nn.Module,
    *,
    top_k: int,
    gate: Gate,
    selection_bias_rate: float,
    capacity: Capacity | None,
    assistance: Assistance | None,
) -> None:
    """Raises ValueError unless a router that chooses fits the layer, and nothing else chooses."""
    if not getattr(router, "chooses", False):
        return
    check_part("router", router, top_k=top_k, score_function=gate.score_function)
    name = type(router).__name__
    for argument, value, without in (
        ("selection_bias_rate", selection_bias_rate, 0),
        ("gate.num_groups", gate.num_groups, 1),
    ):
        if value != without:
            raise ValueError(
                f"MoE: {argument} must be {without} with {name}, which chooses the experts itself, "
                f"got {value}"
            )
    if getattr(router, "scores_all", True):
        return
    overflow = None if capacity is None or capacity.overflow == "drop" else capacity.overflow
    for argument, reroutes in (("capacity.overflow", overflow), ("assistance", assistance)):
        if reroutes is not None:
            raise ValueError(
                f"MoE: {argument} must not lead tokens to experts that {name} gives no score, "
                f"got {reroutes!r}"
            )


def check_estimator(router: nn.Module, experts: object, estimator: Estimator) -> None:
    """Raises ValueError where the estimator would draw what is settled, or ask for what is not."""
    decides_for = getattr(router, "decides_for", "token")
    chooses = getattr(router, "chooses", False)
    if estimator.draws and (chooses or decides_for != "token"):
        reason = "which chooses the experts itself"
        if not chooses:
            reason = f"which decides once for each {decides_for}"
        raise ValueError(
            f"MoE: gate.estimator must not draw each token's experts with "
            f"{type(router).__name__}, {reason}, got {type(estimator).__name__}"
        )
    if estimator.takes_experts_alone and getattr(experts, "mixes_slots", False):
        raise ValueError(
            "MoE: gate.estimator must not need the output of each expert alone with "
            f"{type(experts).__name__}, where it depends on the token's other experts, "
            f"got {type(estimator).__name__}"
        )


def least_experts(router: nn.Module, estimator: Estimator) -> int:
    """How many experts every token is sure to get of the router or the bound estimator."""
    # One of the user's own may leave slots empty.
    own = type(estimator).select.__module__.partition(".")[0] == "torchmoe"
    return estimator.top_k if own and not getattr(router, "chooses", False) else 1


def check_assistance(
    assistance: Assistance | None, router: nn.Module, estimator: Estimator
) -> None:
    """Raises ValueError where it could never begin, or weights move only while somebody assists.

    The assistance and the estimator are bound.
    """
    if assistance is None:
        return
    num_experts, least = assistance.num_experts, least_experts(router, estimator)
    if least == num_experts:
        raise ValueError(
            f"MoE: assistance must be None with top_k {num_experts}, where every token has every "
            f"expert already, got {assistance!r}"
        )
    if assistance.threshold >= num_experts / least:
        raise ValueError(
            f"MoE: assistance.threshold must be below num_experts / top_k = {num_experts / least}, "
            f"the load of an expert that every token chooses, got {assistance.threshold}"
        )
    is_constant = estimator.top_k == 1 and estimator.normalize == "topk"
    if is_constant and estimator.gate_estimator == "exact":
        raise ValueError(
            'MoE: gate.normalize must be "none" for top_k 1 with assistance, without which the '
            'weights are constant and the router learns nothing, got "topk"'
        )
