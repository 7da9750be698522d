"""The laws, one file for each, in the order in which they are asked."""

from torchmoe.testing.certify.law import Law
from torchmoe.testing.certify.laws import (
    accumulation,
    balance,
    determinism,
    gradients,
    higher_orders,
    idle_experts,
    recomputation,
    reference,
    replicas,
    router_gradient,
    symmetry,
    unrouted_tokens,
)

_LAWS: tuple[Law, ...] = (
    gradients.LAW,
    reference.LAW,
    router_gradient.LAW,
    unrouted_tokens.LAW,
    accumulation.LAW,
    recomputation.LAW,
    symmetry.LAW,
    balance.LAW,
    idle_experts.LAW,
    determinism.LAW,
    replicas.LAW,
    higher_orders.LAW,
)


def known_laws() -> tuple[Law, ...]:
    """Every law, in the order in which they are asked."""
    return _LAWS
