"""The situations every op is tried in: sizes and routings, from ordinary to degenerate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import reference

INT64_MIN = torch.iinfo(torch.int64).min
INT64_MAX = torch.iinfo(torch.int64).max


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal values, drawn in float64 so that every dtype sees the same ones, rounded."""
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Situation:
    """T tokens of width H, E experts of inner width I, K choices a token, and where they go."""

    name: str
    routing: str = "plain"
    T: int = 6
    H: int = 5
    I: int = 3  # noqa: E741  the glossary's letter
    E: int = 4
    K: int = 2

    def indices(self) -> Tensor:
        """Expert ids [T, K]; see ROUTINGS."""
        forbidden = 1 if self.routing == "empty_expert" else None
        ranks = torch.rand(self.T, self.E)
        if forbidden is not None:
            ranks[:, forbidden] = 2.0
        ids = ranks.argsort(dim=1)[:, : self.K].contiguous()
        if self.routing == "one_expert":
            ids.fill_(min(2, self.E - 1))
        elif self.routing == "repeated":
            ids[:, 1:] = ids[:, :1]
        elif self.routing == "all_dropped":
            ids.fill_(-1)
        elif self.routing == "dropped":
            ids[::2, -1] = -1
            ids[1::3, 0] = -1
            ids[0] = -1
        elif self.routing == "out_of_range":
            ids[0] = torch.tensor([-1, self.E])
            ids[1, 0] = self.E + 7
            ids[2, 1] = INT64_MIN
            ids[3, 0] = INT64_MAX
        return ids

    def plan(self) -> dict[str, Tensor]:
        """The dispatch plan of `indices`, by the reference, under the ops' argument names."""
        offsets, row_to_slot, slot_to_row = reference.dispatch_plan(self.indices(), self.E)
        return {
            "expert_offsets": offsets,
            "row_to_slot": row_to_slot,
            "slot_to_row": slot_to_row,
        }

    @property
    def longest(self) -> int:
        """The longest sum any op forms here, forward or backward."""
        return max(self.T * self.K, self.H, 2 * self.I, self.E)


def expert_weights(
    s: Situation, dtype: torch.dtype, activation: str, bias: bool
) -> dict[str, Tensor | None]:
    """The experts' parameters under the ops' argument names.

    Scaled as a trained layer is, so that every intermediate is of order one.
    """
    width = s.I * (2 if activation in reference.GATED else 1)
    return {
        "w_in": (normal(s.E, width, s.H) / max(s.H, 1) ** 0.5).to(dtype),
        "b_in": normal(s.E, width, dtype=dtype) if bias else None,
        "w_out": (normal(s.E, s.H, s.I) / max(s.I, 1) ** 0.5).to(dtype),
        "b_out": normal(s.E, s.H, dtype=dtype) if bias else None,
    }


EXPERT_WEIGHTS = ("w_in", "b_in", "w_out", "b_out")

_ALL = (
    Situation("plain"),
    Situation("dropped", routing="dropped"),
    Situation("empty_expert", routing="empty_expert"),
    Situation("top1", K=1),
    Situation("all_experts", K=4),
    Situation("one_expert", routing="one_expert", K=1),
    Situation("repeated", routing="repeated"),
    Situation("single_expert", E=1, K=1),
    Situation("one_token", T=1),
    Situation("no_tokens", T=0),
    Situation("all_dropped", routing="all_dropped"),
    Situation("out_of_range", routing="out_of_range"),
    # More experts, and more choices, than a warp has lanes.
    Situation("many", routing="dropped", T=9, E=70, K=40),
    # Past any vector width and block size, and not a multiple of one.
    Situation("large", routing="dropped", T=131, H=70, I=37, E=9, K=3),
    # Widths that may be read 16 bytes at a time, and more than one tile of a product every way;
    # one of them full to the edge.
    Situation("aligned", routing="dropped", T=200, H=72, I=192, E=3, K=2),
)

SITUATIONS = {situation.name: situation for situation in _ALL}

# Where derivatives are checked numerically.
GRADIENT = ("plain", "dropped", "empty_expert", "top1", "all_experts", "out_of_range", "no_tokens")

# Large enough that a library product split by threads would show.
THREADS = Situation("threads", routing="dropped", T=193, H=96, I=72, E=6, K=2)

# Past every block that work is cut into: 256 tokens, 128 rows of an expert, 128 rows of its matrix
# and 16 experts, none of them a multiple.
BLOCKS = Situation("blocks", T=1300, H=6, I=131, E=18, K=2)

# Distinct token counts, unlike H, I, E, K and 2 I of the plain situation, as a symbolic size needs.
COMPILED_TOKENS = (7, 11, 16)

PLAN = ("expert_offsets", "row_to_slot", "slot_to_row")

# Inputs that would mean something else, or nothing, if all their entries were the same.
TABLES = (*PLAN, "backup")
