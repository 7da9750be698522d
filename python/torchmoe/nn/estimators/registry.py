"""Estimators by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torchmoe._checks import check_callable, check_choice, shown
from torchmoe.nn.declarations import declared_by_router
from torchmoe.nn.estimators.default_vector import DefaultVector
from torchmoe.nn.estimators.estimator import Estimator
from torchmoe.nn.estimators.exact import Exact
from torchmoe.nn.estimators.gumbel_straight_through import GumbelStraightThrough
from torchmoe.nn.estimators.sparsemixer import SparseMixer
from torchmoe.nn.estimators.straight_through import StraightThrough
from torchmoe.nn.estimators.straight_through_dense import StraightThroughDense

if TYPE_CHECKING:
    import torch

    from torchmoe.nn.gate import Gate
    from torchmoe.nn.moe import MoE

# torchmoe.nn exports these too.
__all__ = [
    "DefaultVector",
    "Estimator",
    "Exact",
    "GumbelStraightThrough",
    "SparseMixer",
    "StraightThrough",
    "StraightThroughDense",
    "known_estimators",
    "register_estimator",
]

_REGISTRY: dict[str, Callable[[], Estimator]] = {
    "exact": Exact,
    "straight_through": StraightThrough,
    "straight_through_dense": StraightThroughDense,
    "default_vector": DefaultVector,
    "sparsemixer": SparseMixer,
    "gumbel_straight_through": GumbelStraightThrough,
}


def known_estimators() -> tuple[str, ...]:
    """The registered names."""
    return tuple(_REGISTRY)


def register_estimator(name: str, factory: Callable[[], Estimator]) -> None:
    """Makes Gate(estimator=name) build its estimator with factory(), a new one for each layer.

    Raises:
        TypeError: name is not a string, or factory is not callable.
        ValueError: the name is taken.
    """
    if not isinstance(name, str):
        raise TypeError(f"register_estimator: name must be a string, got {shown(name)}")
    check_callable("register_estimator", "factory", factory)
    if name in _REGISTRY:
        raise ValueError(f'register_estimator: name must be new, got "{name}"')
    _REGISTRY[name] = factory


def build_estimator(estimator: str | Estimator) -> Estimator:
    """A new estimator for a registered name; an instance is used as it is."""
    if isinstance(estimator, Estimator):
        return estimator
    check_choice("Gate", "estimator", estimator, _REGISTRY)
    built = _REGISTRY[estimator]()
    if not isinstance(built, Estimator):
        raise TypeError(
            f'register_estimator: factory must return an Estimator for "{estimator}", '
            f"got {shown(built)}"
        )
    return built


def bound_estimator(
    gate: Gate,
    layer: MoE,
    top_k: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Estimator:
    """The gate's estimator, told about the layer, which has its router."""
    estimator = build_estimator(gate.estimator)
    normalize = gate.normalize or declared_by_router(layer.router).default_normalize
    estimator.bind(
        top_k=top_k,
        num_experts=layer.num_experts,
        hidden_size=layer.hidden_size,
        score_function=gate.score_function,
        normalize=normalize,
        num_groups=gate.num_groups,
        top_groups=gate.top_groups,
        device=device,
        dtype=dtype,
    )
    return estimator
