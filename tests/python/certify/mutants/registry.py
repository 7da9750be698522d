"""Mutants of the correct layers, each with one bug that somebody reported about a real layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

from certify.layers.correct import BASES, Make, build


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A layer with one bug; its parameters equal those of its base for equal seeds.

    Attributes:
        name: in snake case.
        kind: the kind of bug.
        source: where it was reported; "kind reported, e.g. ..." where the report is only similar.
        make: from a seed to the layer.
        base: the name in `BASES` of the layer that it changes.
        use: under which use it is wrong.
        report: what the report says.
        needs_reference: whether it is a lawful layer of another formula or coefficient, which only
            a reference tells from its base.
    """

    name: str
    kind: str
    source: str
    make: Make
    base: str
    use: str
    report: str
    needs_reference: bool = False


_FOUND: list[Mutant] = []


def mutant(
    name: str,
    *,
    base: str,
    kind: str,
    source: str,
    report: str,
    use: str,
    needs_reference: bool = False,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Registers the class below it, built with its base's options."""

    def register(layer: type[nn.Module]) -> type[nn.Module]:
        make = build(layer, **BASES[base][1])
        _FOUND.append(Mutant(name, kind, source, make, base, use, report, needs_reference))
        return layer

    return register


def all_mutants() -> dict[str, Mutant]:
    """By name."""
    from certify.mutants import (  # noqa: F401 (each registers its own)
        balancing_loss,
        capacity,
        clamped_experts,
        higher_orders,
        idle_experts,
        noise,
        routing_weights,
        selection_bias,
        written_backward,
    )

    return {found.name: found for found in _FOUND}
