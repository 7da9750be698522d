"""How many slots an expert keeps, and what happens to the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import cast

import torch
from torch import Tensor

from torchmoe._checks import check_at_least, check_backup, check_choice, check_flag
from torchmoe.capacity import (
    capacity_from_ratio,
    capacity_ratio,
    check_amount,
    check_usage,
    dynamic_from_ratio,
)
from torchmoe.nn._settings import Settings
from torchmoe.ops import ORDERS, OVERFLOWS, PRIORITIES, ROUNDINGS

_NORMALIZES = ("before_drop", "after_drop")


@dataclass(frozen=True, repr=False)
class Capacity(Settings):
    """Limits the slots of an expert to ceil(factor * top_k * num_tokens / num_experts).

    The capacity is computed by `torchmoe.expert_capacity`. Examples:

        Capacity(1.25)                                     all first choices, then all second ones
        Capacity(1.25, order="token")                      token by token
        Capacity(1.25, priority="random")                  random dropping
        Capacity(1.25, priority="weight")                  the smallest weights are dropped
        Capacity(1, overflow="next_best")                  no slot is dropped while there is room
        Capacity(1, overflow="backup", backup=(1, 2, 0))   slots beyond i's capacity go to backup[i]
        Capacity(1, dynamic=True)                          more room where the load has been high

    Causality, that is, whether a later token can change what an earlier one gets: the capacity
    itself grows with the number of tokens in the call, so no option makes the layer causal across
    calls of different lengths. In a call of a given length, order "token" without a priority is
    causal, whatever the overflow. Priorities are not causal, and order "choice" is causal only if
    each token has a single slot.

    Attributes:
        factor: capacity factor in training; 1 is just enough room when tokens spread evenly. Taken
            as the nearest fraction with a denominator of at most 10^6, so 1.1 is 11/10.
        eval_factor: the factor in evaluation mode; None uses `factor`.
        minimum: an expert keeps at least this many slots.
        order: who is served first, see `torchmoe.ops.limit_capacity`. "choice" (all first choices,
            then all second ones) lets a later token's first choice displace an earlier token's
            second, so it is not causal; "token" is.
        overflow: what happens to a slot whose expert is full, see `torchmoe.ops.limit_capacity`.
            "drop", "next_best" (by the scores that rank the experts, those outside the token's
            expert groups last) or "backup". A rerouted slot has the weight of its new expert.
        normalize: "before_drop": weights are formed before slots are dropped, so a token that loses
            a slot keeps the weights of its other slots, and its router a gradient. "after_drop":
            weights are formed over the remaining slots, so that they sum to 1 again. With the
            gate's normalize "none" there is no difference.
        priority: None: as `order` says. "random": in training by a random draw for every slot, from
            torch's default generator; in evaluation by `order`. "weight": larger combine weights
            first (V-MoE, arXiv 2106.05974), equal ones by `order`.
        backup: for overflow "backup": another expert for each expert.
        rounding: "up", or "down" for the floor of the formula.
        dynamic: each expert's capacity is that of `torchmoe.dynamic_capacity` with the router's
            `usage`: history decides which experts may take more.

    Raises:
        TypeError: a value has another type.
        ValueError: a value is out of range or unknown, or conflicts with another.
    """

    factor: float | Fraction | Decimal
    eval_factor: float | Fraction | Decimal | None = None
    minimum: int = 0
    order: str = "choice"
    overflow: str = "drop"
    normalize: str = "before_drop"
    priority: str | None = None
    backup: Sequence[int] | None = None
    rounding: str = "up"
    dynamic: bool = False
    # The factors as two integers each, by whether the layer trains.
    _ratios: dict[bool, tuple[int, int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Checks every field and turns the factors into integers, once."""
        check_at_least("Capacity", "minimum", self.minimum, 0)
        check_choice("Capacity", "rounding", self.rounding, ROUNDINGS)
        check_choice("Capacity", "order", self.order, ORDERS)
        if self.priority is not None:
            check_choice("Capacity", "priority", self.priority, PRIORITIES)
        check_choice("Capacity", "overflow", self.overflow, OVERFLOWS)
        check_choice("Capacity", "normalize", self.normalize, _NORMALIZES)
        check_flag("Capacity", "dynamic", self.dynamic)
        if self.backup is not None:
            object.__setattr__(self, "backup", check_backup("Capacity", self.backup))
        if (self.backup is not None) != (self.overflow == "backup"):
            requirement = "given" if self.backup is None else "None"
            raise ValueError(
                f'Capacity: backup must be {requirement} with overflow "{self.overflow}", '
                f"got {self.backup}"
            )
        if self.dynamic and self.rounding != "up":
            raise ValueError(
                f'Capacity: rounding must be "up" with dynamic=True, got "{self.rounding}"'
            )
        ratio = capacity_ratio(self.factor, op="Capacity", argument="factor")
        eval_ratio = ratio
        if self.eval_factor is not None:
            eval_ratio = capacity_ratio(self.eval_factor, op="Capacity", argument="eval_factor")
        object.__setattr__(self, "_ratios", {True: ratio, False: eval_ratio})

    @property
    def reroutes(self) -> bool:
        """Whether a slot that finds its expert full may get another one."""
        return self.overflow != "drop"

    def renormalizes(self, normalize: str) -> bool:
        """Whether weights are formed over the slots that are left, for this gate's `normalize`."""
        return self.normalize == "after_drop" and normalize != "none"

    def slots(
        self,
        num_tokens: int | Tensor,
        num_experts: int,
        top_k: int,
        *,
        training: bool,
        usage: Tensor | None = None,
    ) -> int | Tensor:
        """The most slots an expert keeps of num_tokens counted tokens.

        Args:
            num_tokens: an int, a symbolic int, or an integer scalar.
            num_experts: E.
            top_k: K.
            training: which of the two factors.
            usage: [E], for a dynamic capacity.

        Returns:
            One capacity for all experts, a scalar tensor if num_tokens is one; if dynamic, [E].

        Raises:
            TypeError: an argument has another type.
            ValueError: a number is out of range, or num_tokens is a tensor of another dtype.
            RuntimeError: usage has another shape or dtype.
        """
        check_amount("Capacity", "num_tokens", num_tokens)
        check_at_least("Capacity", "num_experts", num_experts, 1)
        check_at_least("Capacity", "top_k", top_k, 1)
        check_flag("Capacity", "training", training)
        ratio = self._ratios[training]
        if not self.dynamic:
            return capacity_from_ratio(
                num_tokens, num_experts, top_k, ratio, self.minimum, self.rounding
            )
        check_usage("Capacity", usage)
        slots = dynamic_from_ratio(cast(Tensor, usage), top_k * num_tokens, ratio)
        slots = slots.clamp(min=self.minimum)
        if isinstance(num_tokens, Tensor):
            return torch.minimum(slots, num_tokens)
        return slots.clamp(max=num_tokens)
