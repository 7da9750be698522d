"""A router that learns nothing: a token's id determines which experts serve it."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from torchmoe import ops
from torchmoe._checks import Fixed, check_among, check_at_least, check_integer
from torchmoe.nn._buffers import Remembering
from torchmoe.nn._table import Table
from torchmoe.nn.declarations import RouterDeclaration

# Far below the logit of a chosen expert, 0, yet finite: its score is 0, and no loss turns 0 times
# -inf into NaN. An int, since torch.compile takes a float from outside for a variable at first and
# then compiles once more.
_NOT_CHOSEN = -10_000
# Two odd constants that change about half of the bits: those of the 64-bit mixer splitmix64
# (Steele et al., OOPSLA 2014), as int64.
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
_STEP = 0x9E3779B97F4A7C15 - 2**64

Numbers = TypeVar("Numbers", int, Tensor)


class HashRouter(RouterDeclaration, Remembering):
    """The experts are a fixed hash of the token's id (Roller et al., arXiv 2106.04426).

    Each pair of an id and an expert has a fixed random number, and an id goes to the top_k experts
    with the largest ones. These get logit 0, and the others a logit so low that its score is 0:
    with score_function "softmax" every weight is 1 / top_k, whatever the normalisation. There is
    nothing to learn. The loads are as even as the ids' frequencies: a frequent id loads its
    experts.

    Args:
        num_experts: E.
        top_k: K, as in the layer.
        seed: selects the hash; layers with different seeds group the ids differently.

    Raises:
        TypeError: a size or seed is not an int.
        ValueError: a size is out of range.
    """

    # A selection bias, groups of experts, rerouting or assistance would send a token to experts
    # whose score is 0.
    chooses = True
    scores_all = False
    num_experts = Fixed[int]()
    top_k = Fixed[int]()
    seed = Fixed[int]()

    def __init__(self, num_experts: int, top_k: int = 1, *, seed: int = 0) -> None:
        super().__init__()
        check_at_least("HashRouter", "num_experts", num_experts, 1)
        check_among("HashRouter", "top_k", top_k, num_experts)
        check_integer("HashRouter", "seed", seed)
        self.num_experts, self.top_k, self.seed = num_experts, top_k, seed
        # A number for each expert, as a tensor: one compiled graph then serves every seed.
        first = seed * num_experts
        self._salt = Table([_mix(_wrapped((first + i) * _STEP)) for i in range(num_experts)])

    def forward(self, token_ids: Tensor) -> Tensor:
        """The logits of each token.

        Args:
            token_ids: [T] integers, any value: the layer's router_input.

        Returns:
            logits [T, E] float32, without a gradient.

        Raises:
            RuntimeError: token_ids are not integers [T], as when the layer got no router_input.
        """
        if token_ids.dim() != 1 or token_ids.is_floating_point() or token_ids.is_complex():
            raise RuntimeError(
                "HashRouter: router_input must be token ids, integers with x's leading dimensions, "
                f"got {token_ids.dtype} of shape {list(token_ids.shape)}"
            )
        salt = self._salt.on(token_ids.device)
        numbers = _mix(token_ids.to(torch.int64).unsqueeze(1) * _STEP ^ salt)  # [T, E]
        # 53 bits, which float64 holds exactly.
        chosen = ops.select_experts((numbers >> 11).to(torch.float64), self.top_k)
        logits = torch.full(
            numbers.shape, _NOT_CHOSEN, dtype=torch.float32, device=token_ids.device
        )
        return logits.scatter(1, chosen, 0.0)

    def extra_repr(self) -> str:
        """The settings."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}, seed={self.seed}"


def _wrapped(number: int) -> int:
    """The int64 that is equal to it modulo 2^64."""
    return (number + 2**63) % 2**64 - 2**63


def _mix(numbers: Numbers) -> Numbers:
    """A bijection of int64 in which every bit of the result depends on every bit of the input."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        numbers = _times(numbers ^ _shifted(numbers, shift), factor)
    return numbers ^ _shifted(numbers, 31)


def _times(numbers: Numbers, factor: int) -> Numbers:
    if isinstance(numbers, int):
        return _wrapped(numbers * factor)
    return numbers * factor


def _shifted(numbers: Numbers, bits: int) -> Numbers:
    """Shifted right with zeros from the left, as unsigned numbers are."""
    shifted: Numbers = (numbers >> bits) & (2 ** (64 - bits) - 1)
    return shifted
