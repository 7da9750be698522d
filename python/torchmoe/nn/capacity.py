"""How much an expert may take, and what happens to the rest."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from torchmoe.capacity import (
    capacity_from_ratio,
    capacity_ratio,
    computes_in_int64,
    int64_ratio,
)
from torchmoe.nn._checks import check_at_least, check_choice

ORDERS = ("choice", "token")
_OVERFLOWS = ("drop",)
_NORMALIZES = ("before_drop", "after_drop")


@dataclass(frozen=True)
class Capacity:
    """Limits the slots of an expert to ceil(factor * top_k * num_tokens / num_experts).

    The arithmetic is that of `torchmoe.expert_capacity`.

    Attributes:
        factor: capacity factor in training; 1 is just enough room when tokens spread evenly. Taken
            as the decimal number that was written, so 1.1 is 11/10.
        eval_factor: the factor in evaluation mode; None uses `factor`.
        minimum: an expert keeps at least this many slots.
        order: who is served first, see `torchmoe.ops.limit_capacity`. "choice" (all first choices,
            then all second ones) lets a later token's first choice displace an earlier token's
            second, so it is not causal; "token" is.
        overflow: "drop": a slot that finds its expert full is dropped.
        normalize: "before_drop": weights are formed before slots are dropped, so a token that loses
            a slot keeps the other's weight and its router a gradient. "after_drop": over the slots
            that are left, so that they sum to 1 again. With the gate's normalize "none" there is no
            difference.

    Raises:
        TypeError: a factor is not a number.
        ValueError: a value is out of range or unknown.
    """

    factor: float
    eval_factor: float | None = None
    minimum: int = 0
    order: str = "choice"
    overflow: str = "drop"
    normalize: str = "before_drop"
    # The factor in training and in evaluation, each as two integers and as two that suit int64.
    _ratios: dict[tuple[bool, bool], tuple[int, int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Checks every field and turns the factors into integers, once."""
        check_at_least("Capacity", "minimum", self.minimum, 0)
        check_choice("Capacity", "order", self.order, ORDERS)
        check_choice("Capacity", "overflow", self.overflow, _OVERFLOWS)
        check_choice("Capacity", "normalize", self.normalize, _NORMALIZES)
        ratio = capacity_ratio(self.factor, op="Capacity", argument="factor")
        eval_ratio = ratio
        if self.eval_factor is not None:
            eval_ratio = capacity_ratio(self.eval_factor, op="Capacity", argument="eval_factor")
        ratios = {
            (True, False): ratio,
            (True, True): int64_ratio(ratio),
            (False, False): eval_ratio,
            (False, True): int64_ratio(eval_ratio),
        }
        object.__setattr__(self, "_ratios", ratios)

    def slots(
        self, num_tokens: int | Tensor, num_experts: int, top_k: int, *, training: bool
    ) -> int | Tensor:
        """The most slots an expert keeps of num_tokens counted tokens; a tensor for a tensor."""
        ratio = self._ratios[training, computes_in_int64(num_tokens)]
        return capacity_from_ratio(num_tokens, num_experts, top_k, ratio, self.minimum)
