"""Which parts of a layer are compatible: one table of pairs that are not, with the reasons.

A message reads `MoE: argument must ..., got ...`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from torchmoe._checks import check_experts, check_kind, check_module
from torchmoe.nn.assistance import Assistance
from torchmoe.nn.balance import Balance
from torchmoe.nn.capacity import Capacity
from torchmoe.nn.declarations import (
    ExpertsDeclaration,
    RouterDeclaration,
    declared_by_experts,
    declared_by_router,
)
from torchmoe.nn.estimators.estimator import Estimator, ExpertFunction
from torchmoe.nn.gate import Gate
from torchmoe.nn.routers.context_router import scoring_of
from torchmoe.nn.routing_cache import RoutingCache

if TYPE_CHECKING:
    from torchmoe.nn.moe import MoE


@dataclass(frozen=True)
class Parts:
    """The parts of one layer; the estimator is bound.

    Attributes:
        num_experts: E.
        balance: how loads are kept even.
        capacity: of an expert, or None.
        assistance: or None.
        router: what the router tells.
        experts: what the experts tell.
        estimator: the gradient estimator.
        cache: or None.
        scores_gate_inputs: whether the router scores gate inputs one by one.
        names: how messages call router and experts.
        has_bias: whether there is a selection bias.
    """

    num_experts: int
    balance: Balance
    capacity: Capacity | None
    assistance: Assistance | None
    router: RouterDeclaration
    experts: ExpertsDeclaration
    estimator: Estimator
    cache: RoutingCache | None
    scores_gate_inputs: bool
    names: tuple[str, str]
    has_bias: bool

    @classmethod
    def of(
        cls,
        layer: MoE,
        balance: Balance,
        capacity: Capacity | None,
        cache: RoutingCache | None,
    ) -> Parts:
        """Those of a layer, with these settings; raises TypeError unless they are such."""
        check_settings(balance, capacity, cache)
        return cls(
            num_experts=layer.num_experts,
            balance=balance,
            capacity=capacity,
            assistance=layer.assistance,
            router=declared_by_router(layer.router),
            experts=declared_by_experts(layer.experts),
            estimator=layer.estimator,
            cache=cache,
            scores_gate_inputs=scoring_of(layer.router) is not None,
            names=(type(layer.router).__name__, type(layer.experts).__name__),
            has_bias=layer.selection_bias is not None,
        )

    @property
    def overflow(self) -> str:
        """What happens to slots that find their expert full."""
        return "drop" if self.capacity is None else self.capacity.overflow

    @property
    def backup(self) -> Sequence[int]:
        """The capacity's table, empty without one."""
        return () if self.capacity is None else self.capacity.backup or ()

    @property
    def sure_experts(self) -> int:
        """How many experts every token is certain to get."""
        return least_experts(self.router, self.estimator)

    @property
    def usage_readers(self) -> list[str]:
        """What reads the router's usage."""
        return usage_readers(self.balance, self.capacity, self.assistance)

    @property
    def most_load(self) -> float:
        """Of an expert that every token chooses, in multiples of the even share."""
        return self.num_experts / self.sure_experts

    @property
    def update_readers(self) -> list[str]:
        """What reads something that `MoE.update` moves."""
        estimator = type(self.estimator)
        others = {
            "a selection bias": self.has_bias,
            "usage_scaling": self.router.reads_usage,
            f"the estimator {estimator.__name__}": estimator.update is not Estimator.update,
            "a routing cache": self.cache is not None,
        }
        return [*self.usage_readers, *(name for name, reads in others.items() if reads)]


class Pair(NamedTuple):
    """Two parts that are not compatible under a condition."""

    argument: str
    """The one of the two that messages name."""
    clashes: Callable[[Parts], bool]
    requirement: Callable[[Parts], str]
    """What must hold instead, and why."""
    got: Callable[[Parts], object]


def _says(text: str) -> Callable[[Parts], str]:
    """A requirement in which {router} and {experts} are the names of those."""
    return lambda p: text.format(router=p.names[0], experts=p.names[1])


def _estimator(p: Parts) -> str:
    return type(p.estimator).__name__


def _leaves_out(p: Parts) -> bool:
    """Whether a call may do without the router's logits."""
    return p.cache is not None and p.cache.reuse == "weights"


_CHOOSES = "{router}, which chooses the experts itself"
_NO_SCORE = "not lead tokens to experts that {router} gives no score"

PAIRS: tuple[Pair, ...] = (
    # --- the router's usage, and whatever reads it
    Pair(
        "router",
        lambda p: bool(p.usage_readers) and not p.router.keeps_usage,
        lambda p: f"keep usage for {p.usage_readers[0]}, as Router(track_usage=True) does",
        lambda p: f"{p.names[0]} without",
    ),
    # --- a router that chooses, and whatever else would
    Pair(
        "balance.selection_bias_rate",
        lambda p: p.router.chooses and p.balance.selection_bias_rate > 0,
        _says(f"be 0 with {_CHOOSES}"),
        lambda p: p.balance.selection_bias_rate,
    ),
    Pair(
        "gate.num_groups",
        lambda p: p.router.chooses and p.estimator.num_groups > 1,
        _says(f"be 1 with {_CHOOSES}"),
        lambda p: p.estimator.num_groups,
    ),
    Pair(
        "gate.estimator",
        lambda p: p.router.chooses and p.estimator.draws,
        _says(f"not draw each token's experts with {_CHOOSES}"),
        _estimator,
    ),
    Pair(
        "gate.estimator",
        lambda p: p.router.decides_for != "token" and p.estimator.draws,
        lambda p: (
            f"not draw each token's experts with {p.names[0]}, which decides once for each "
            f"{p.router.decides_for}"
        ),
        _estimator,
    ),
    # --- a router whose other experts have no score, and what leads tokens to them
    Pair(
        "capacity.overflow",
        lambda p: not p.router.scores_all and p.overflow != "drop",
        _says(_NO_SCORE),
        lambda p: repr(p.overflow),
    ),
    Pair(
        "assistance",
        lambda p: not p.router.scores_all and p.assistance is not None,
        _says(_NO_SCORE),
        lambda p: p.assistance,
    ),
    # --- a cache, and a choice that is not the gate input's alone
    Pair(
        "cache",
        lambda p: p.cache is not None and p.router.chooses,
        _says(f"be None with {_CHOOSES}"),
        lambda p: p.cache,
    ),
    Pair(
        "cache",
        lambda p: p.cache is not None and not p.scores_gate_inputs,
        _says("be None with {router}, which scores no gate inputs one by one"),
        lambda p: p.cache,
    ),
    Pair(
        "cache",
        lambda p: p.cache is not None and p.estimator.draws,
        lambda p: f"be None for the estimator {_estimator(p)}, which draws each token's experts",
        lambda p: p.cache,
    ),
    # --- calls that leave the router out, and whatever reads its logits
    Pair(
        "cache.reuse",
        lambda p: _leaves_out(p) and p.capacity is not None and p.capacity.reroutes,
        lambda p: f'be "ids" with capacity.overflow "{p.overflow}", which reads the logits',
        lambda p: '"weights"',
    ),
    Pair(
        "cache.reuse",
        lambda p: (
            _leaves_out(p)
            and p.capacity is not None
            and p.capacity.renormalizes(p.estimator.normalize)
        ),
        lambda p: 'be "ids" with capacity.normalize "after_drop", which reads the logits',
        lambda p: '"weights"',
    ),
    Pair(
        "cache.reuse",
        lambda p: _leaves_out(p) and p.assistance is not None,
        lambda p: 'be "ids" with assistance, whose slots are weighed by the logits',
        lambda p: '"weights"',
    ),
    Pair(
        "cache.reuse",
        lambda p: _leaves_out(p) and type(p.estimator).combine is not Estimator.combine,
        lambda p: f'be "ids" for the estimator {_estimator(p)}, which may read the logits',
        lambda p: '"weights"',
    ),
    # --- the estimator, and what it has no formula for
    Pair(
        "gate.estimator",
        lambda p: p.estimator.takes_experts_alone and p.experts.mixes_slots,
        _says(
            "not need the output of each expert alone with {experts}, where it depends on the "
            "token's other experts"
        ),
        _estimator,
    ),
    Pair(
        "balance.selection_bias_rate",
        lambda p: p.balance.selection_bias_rate > 0 and not p.estimator.takes_selection_bias,
        lambda p: f"be 0 for the estimator {_estimator(p)}, {p.estimator.refusal}",
        lambda p: p.balance.selection_bias_rate,
    ),
    Pair(
        "balance.selection_bias_rate",
        lambda p: p.balance.selection_bias_rate > 0 and not p.has_bias,
        _says("stay 0 in a layer that was made without a selection bias"),
        lambda p: p.balance.selection_bias_rate,
    ),
    # --- capacity and assistance, and the number of experts
    Pair(
        "capacity.backup",
        lambda p: len(p.backup) not in (0, p.num_experts),
        lambda p: f"have {p.num_experts} entries, one for each expert",
        lambda p: len(p.backup),
    ),
    Pair(
        "assistance",
        lambda p: p.assistance is not None and p.sure_experts == p.num_experts,
        lambda p: f"be None with top_k {p.num_experts}, where every token has every expert already",
        lambda p: p.assistance,
    ),
    Pair(
        "assistance.threshold",
        lambda p: p.assistance is not None and p.assistance.threshold >= p.most_load,
        lambda p: (
            f"be below num_experts / top_k = {p.most_load}, the load of an expert that every "
            "token chooses"
        ),
        lambda p: p.assistance and p.assistance.threshold,
    ),
    Pair(
        "gate.normalize",
        lambda p: (
            p.assistance is not None
            and (p.estimator.top_k, p.estimator.normalize) == (1, "topk")
            and p.estimator.has_constant_weights(1)
        ),
        _says(
            'be "none" for top_k 1 with assistance, without which the weights are constant and '
            "the router learns nothing"
        ),
        lambda p: f'"{p.estimator.normalize}"',
    ),
)


def check_pairs(parts: Parts) -> None:
    """Raises ValueError for the first pair that is not compatible."""
    for pair in PAIRS:
        if pair.clashes(parts):
            raise ValueError(
                f"MoE: {pair.argument} must {pair.requirement(parts)}, got {pair.got(parts)}"
            )


def check_sizes(
    layer: MoE,
    gate: Gate,
    top_k: int,
    router: nn.Module,
    experts: ExpertFunction,
    assistance: Assistance | None,
) -> None:
    """Raises ValueError if a replaced part says that it was made for another layer."""
    number: dict[str, object] = {"num_experts": layer.num_experts}
    choice: dict[str, object] = {"top_k": top_k, "score_function": gate.score_function}
    for argument, part, made_for in (
        ("router", router, number),
        ("router", router, choice if declared_by_router(router).chooses else {}),
        ("experts", experts, number | {"hidden_size": layer.hidden_size}),
        ("assistance", assistance, number),
    ):
        for name, expected in made_for.items():
            actual = getattr(part, name, expected)
            if actual != expected:
                raise ValueError(f"MoE: {argument} must have {name} {expected}, got {actual}")


def usage_readers(
    balance: Balance, capacity: Capacity | None, assistance: Assistance | None
) -> list[str]:
    """What reads the router's usage."""
    readers = {
        "a dynamic capacity": capacity is not None and capacity.dynamic,
        "assistance": assistance is not None,
        'balance.fraction_from "history"': balance.fraction_from == "history",
    }
    return [name for name, reads in readers.items() if reads]


def least_experts(router: RouterDeclaration, estimator: Estimator) -> int:
    """How many experts every token is certain to get."""
    return estimator.top_k if estimator.fills_slots and not router.chooses else 1


def check_given(
    gate: Gate,
    capacity: Capacity | None,
    balance: Balance,
    assistance: Assistance | None,
    shared_experts: nn.Module | None,
    router: nn.Module | None,
    experts: ExpertFunction | None,
    cache: RoutingCache | None,
) -> None:
    """Raises TypeError unless each of a layer's parts is of its kind."""
    estimator = gate if isinstance(gate, str) else "exact"
    check_kind("MoE", "gate", gate, Gate, example=f'Gate(estimator="{estimator}")')
    check_settings(balance, capacity, cache)
    check_kind("MoE", "assistance", assistance, Assistance, optional=True)
    for argument, module in (("shared_experts", shared_experts), ("router", router)):
        if module is not None:
            check_module("MoE", argument, module)
    if experts is not None:
        check_experts("MoE", experts)


def check_settings(balance: Balance, capacity: Capacity | None, cache: RoutingCache | None) -> None:
    """Raises TypeError unless all are what they are called."""
    check_kind("MoE", "balance", balance, Balance, example="Balance(0.01)")
    check_kind("MoE", "capacity", capacity, Capacity, example="Capacity(1.25)", optional=True)
    check_kind("MoE", "cache", cache, RoutingCache, example="RoutingCache(4096)", optional=True)
