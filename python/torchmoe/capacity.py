"""How many slots an expert keeps: one capacity for all experts, or one each from their history.

A float product rounds 1.1 * 2 * 200 / 4 up past 110, and a ceiling then gives 111. So a capacity
factor is taken as the nearest fraction with a denominator of at most 10^6 (1.1 is 11/10, 4 / 3 is
4/3), and everything after that is integer arithmetic, which is exact, the same in Python and C++,
and traces with a symbolic number of tokens.
"""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import overload

import torch
from torch import Tensor

from torchmoe._checks import (
    check_among,
    check_at_least,
    check_choice,
    check_number,
    readable,
    shown,
)
from torchmoe.ops import ROUNDINGS

# The largest denominator of a factor. A share of the tokens is then a fraction of at most 10^6 *
# num_experts parts, which an int64 can multiply with 9 * 10^12 / num_experts tokens.
_MOST_PARTS = 10**6
_MOST_EXPERTS = 2**31


def capacity_ratio(
    factor: float | Fraction | Decimal,
    *,
    op: str = "expert_capacity",
    argument: str = "capacity_factor",
) -> tuple[int, int]:
    """The capacity factor as two integers: the nearest fraction with a denominator up to 10^6.

    Args:
        factor: a finite number >= 0.
        op: the name that error messages start with.
        argument: the argument's name in error messages.

    Returns:
        Numerator and denominator in lowest terms.

    Raises:
        TypeError: factor is not a real number.
        ValueError: factor is negative, NaN or infinite.
    """
    if isinstance(factor, Decimal):
        is_finite = factor.is_finite()
    else:
        check_number(op, argument, factor)
        is_finite = factor < math.inf  # of a NaN too, and of fractions too large for a float
    if not is_finite or factor < 0:
        raise ValueError(f"{op}: {argument} must be a finite number >= 0, got {factor}")
    # A numpy scalar is no float.
    exact = factor if isinstance(factor, int | Fraction | Decimal) else float(factor)
    ratio = Fraction(exact).limit_denominator(_MOST_PARTS)
    return ratio.numerator, ratio.denominator


@overload
def expert_capacity(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    capacity_factor: float | Fraction | Decimal,
    min_capacity: int = 0,
    rounding: str = "up",
) -> int: ...
@overload
def expert_capacity(
    num_tokens: Tensor,
    num_experts: int,
    top_k: int,
    capacity_factor: float | Fraction | Decimal,
    min_capacity: int = 0,
    rounding: str = "up",
) -> Tensor: ...
def expert_capacity(
    num_tokens: int | Tensor,
    num_experts: int,
    top_k: int,
    capacity_factor: float | Fraction | Decimal,
    min_capacity: int = 0,
    rounding: str = "up",
) -> int | Tensor:
    """The most slots an expert keeps: ceil(capacity_factor * top_k * num_tokens / num_experts).

    Then at least `min_capacity`, and at most `num_tokens`, since no expert gets more than one slot
    of a token. The formula is from GShard (arXiv 2006.16668) and Switch Transformer (arXiv
    2101.03961), here in integers: 1.1 means 11/10.

    Args:
        num_tokens: how many tokens count: an int, a symbolic int under torch.compile, or an integer
            tensor (then the result is an int64 tensor of its shape, computed on its device without
            a sync). A symbolic int or a tensor may be at most 9 * 10^12 / num_experts.
        num_experts: E, at most 2^31.
        top_k: K, slots per token, at most E.
        capacity_factor: 1 is just enough room when the tokens spread evenly. int, float, Fraction
            or Decimal; rounded to the nearest fraction with a denominator of at most 10^6.
        min_capacity: lower bound, for batches of very few tokens.
        rounding: "up", or "down" for the floor instead of the ceiling (Mesh TensorFlow and the
            libraries that follow it).

    Returns:
        The capacity, 0 for no tokens.

    Raises:
        TypeError: a number has another type.
        ValueError: an argument is out of range or unknown, or num_tokens is a tensor whose dtype is
            not an integer one, or that has a negative element (checked on the CPU only).
    """
    check_among("expert_capacity", "num_experts", num_experts, _MOST_EXPERTS)
    check_among("expert_capacity", "top_k", top_k, num_experts)
    check_at_least("expert_capacity", "min_capacity", min_capacity, 0)
    check_choice("expert_capacity", "rounding", rounding, ROUNDINGS)
    check_amount("expert_capacity", "num_tokens", num_tokens)
    ratio = capacity_ratio(capacity_factor)
    return capacity_from_ratio(num_tokens, num_experts, top_k, ratio, min_capacity, rounding)


def capacity_from_ratio(
    num_tokens: int | Tensor,
    num_experts: int,
    top_k: int,
    ratio: tuple[int, int],
    min_capacity: int,
    rounding: str,
) -> int | Tensor:
    """`expert_capacity` for checked arguments and a factor that is two integers; see there."""
    numerator, denominator = ratio[0] * top_k, ratio[1] * num_experts
    # A capacity above num_tokens means nothing, so a larger factor is cut here, before it can
    # overflow an int64.
    numerator = min(numerator, denominator)
    excess = denominator - 1 if rounding == "up" else 0

    if isinstance(num_tokens, Tensor):
        tokens = num_tokens.to(torch.int64)
        slots = (tokens * numerator + excess) // denominator
        return torch.minimum(slots.clamp(min=min_capacity), tokens)

    slots_int = (num_tokens * numerator + excess) // denominator
    if isinstance(slots_int, int):  # as torch.compile takes a symbolic number too
        return min(max(slots_int, min_capacity), num_tokens)
    # torch.sym_max and sym_min, unlike max and min, put no guard on a symbolic number of tokens.
    at_least = torch.sym_max(slots_int, min_capacity)
    capacity: int = torch.sym_min(at_least, num_tokens)
    return capacity


def check_usage(op: str, usage: Tensor | None) -> None:
    """Raises unless usage is a tensor (TypeError) [E] and floating (RuntimeError)."""
    if not isinstance(usage, Tensor):
        raise TypeError(f"{op}: usage must be a tensor, got {shown(usage)}")
    if usage.dim() != 1 or not usage.is_floating_point():
        raise RuntimeError(
            f"{op}: usage must be [num_experts] and floating, "
            f"got {usage.dtype} of shape {list(usage.shape)}"
        )


def check_amount(op: str, argument: str, number: int | Tensor) -> None:
    """Raises unless the number is an int or an integer tensor, and, where that is seen, >= 0."""
    if not isinstance(number, Tensor):
        if isinstance(number, bool) or not isinstance(number, int | torch.SymInt):
            raise TypeError(f"{op}: {argument} must be an int or tensor, got {shown(number)}")
        check_at_least(op, argument, number, 0)
    elif number.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{op}: {argument} must be an int or an int64 tensor, got a tensor of {number.dtype}"
        )
    elif readable(number) and (number < 0).any():
        raise ValueError(f"{op}: {argument} must be >= 0, got {number.min().item()}")


def dynamic_capacity(
    usage: Tensor, num_slots: int | Tensor, factor: float | Fraction | Decimal = 1
) -> Tensor:
    """A capacity for each expert that follows its history: more room where the load has been high.

        capacity_i = ceil(max(1, usage_i / mean(usage)) * factor * num_slots / num_experts)

    in float64, where a relative excess below 1e-6 does not round up; at most num_slots. An expert
    asks for one slot for each token of this batch that chose it; slots beyond its capacity are
    refused (`torchmoe.ops.limit_capacity`). The demand comes from this batch, the factor from past
    steps (`Router.usage`). With the current load in both places no expert could ever ask for more
    than its capacity, and the rule would refuse nothing.

    Args:
        usage: [E] floating, each expert's share of the slots so far; only the ratios matter. An
            entry that is not above the mean, NaN included, counts as the mean.
        num_slots: top_k times the number of counted tokens: an int, a symbolic int under
            torch.compile, or an integer scalar on usage's device.
        factor: 1 is just enough room when the tokens spread as before; a finite number >= 0.

    Returns:
        [E] int64 on usage's device, computed without a sync.

    Raises:
        TypeError: usage is not a tensor, factor not a number, or num_slots neither an int nor a
            tensor.
        ValueError: factor is negative, NaN or infinite, num_slots is negative (a tensor is checked
            on the CPU only), or num_slots is a tensor whose dtype is not an integer one.
        RuntimeError: usage has another shape or is not floating, or num_slots is not a scalar.
    """
    check_usage("dynamic_capacity", usage)
    check_amount("dynamic_capacity", "num_slots", num_slots)
    if isinstance(num_slots, Tensor) and num_slots.dim() != 0:
        raise RuntimeError(
            "dynamic_capacity: num_slots must be an int or a scalar, "
            f"got shape {list(num_slots.shape)}"
        )
    ratio = capacity_ratio(factor, op="dynamic_capacity", argument="factor")
    return dynamic_from_ratio(usage, num_slots, ratio)


def dynamic_from_ratio(usage: Tensor, num_slots: int | Tensor, ratio: tuple[int, int]) -> Tensor:
    """`dynamic_capacity` for checked arguments and a factor that is two integers; see there."""
    # Not constants of the module: under torch.compile(dynamic=True) torch 2.11 takes such a float
    # for one that may change, and compiles twice.
    excess = 1e-6  # how far above a whole number, relative to itself, a capacity still counts as it
    rounding = 1e-14  # what three products and a quotient may err by, with a wide margin
    num_experts = usage.shape[0]
    # A larger factor gives no expert more, and might not fit a float.
    factor = ratio[0] / ratio[1] if ratio[0] < num_experts * ratio[1] else num_experts
    load = usage.double()
    relative = load / load.mean()
    relative = torch.where(relative > 1, relative, 1.0).clamp(max=num_experts)
    places = relative * (factor / max(num_experts, 1)) * num_slots
    # A whole number that was rounded down by a few units in the last place is that number.
    whole = (places * (1 + rounding)).floor()
    capacity = torch.where(places - whole > excess * places, whole + 1, whole)
    if isinstance(num_slots, Tensor):
        capacity = torch.minimum(capacity, num_slots.double())
    else:
        capacity = capacity.clamp(max=num_slots)
    return capacity.clamp(min=0).to(torch.int64)
