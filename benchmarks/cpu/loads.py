"""Does it matter how the tokens are spread over the experts?"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.clock import Run, timed
from benchmarks.contenders import Shape
from benchmarks.cpu.section import Section, Settings
from benchmarks.markdown import table
from torchmoe import ops

BALANCED = "balanced"


class ExpertStep:
    """A forward and backward pass of expert_mlp with the given experts."""

    def __init__(self, indices: Tensor, hidden: int, inner: int, experts: int) -> None:
        """Draws tokens, weights and parameters."""
        tokens = len(indices)
        self.indices = indices
        self.x = torch.randn(tokens, hidden).requires_grad_()
        self.weights = torch.rand(indices.shape).requires_grad_()
        self.w_in = (torch.randn(experts, 2 * inner, hidden) / hidden**0.5).requires_grad_()
        self.w_out = (torch.randn(experts, hidden, inner) / inner**0.5).requires_grad_()
        self.grad = torch.randn(tokens, hidden)

    def forward(self) -> Tensor:
        """The experts' weighted sum."""
        return ops.expert_mlp(
            self.x, self.indices, self.weights, self.w_in, None, self.w_out, None, "swiglu"
        )

    def step(self) -> tuple[Tensor, ...]:
        """Every gradient."""
        leaves = (self.x, self.weights, self.w_in, self.w_out)
        return torch.autograd.grad(self.forward(), leaves, self.grad)


def indices_with(counts: Tensor, top_k: int) -> Tensor:
    """[T, K] with so many slots of each expert, in random places."""
    slots = torch.arange(len(counts)).repeat_interleave(counts)
    return slots[torch.randperm(len(slots))].view(-1, top_k)


def loads(shape: Shape) -> dict[str, Tensor]:
    """Rows of each expert; all of them add up to the same."""
    ranks = torch.arange(1, shape.experts + 1, dtype=torch.float64)
    half = torch.full((shape.experts,), 0.5 / max(1, shape.experts - 1), dtype=torch.float64)
    half[0] = 0.5
    shares = {BALANCED: torch.ones_like(ranks), "half on one": half, "Zipf": 1 / ranks}
    return {name: apportioned(share, shape.rows) for name, share in shares.items()}


def apportioned(share: Tensor, rows: int) -> Tensor:
    """Integers in these proportions that add up to rows."""
    ends = (share.cumsum(0) / share.sum() * rows).round().long()
    ends[-1] = rows
    return ends.diff(prepend=ends.new_zeros(1))


def section_loads(settings: Settings) -> Section:
    """The time of each load over that of balanced experts."""
    rows: list[list[str]] = []
    for shape in settings.shapes:
        torch.manual_seed(0)
        given = loads(shape)
        runs: dict[str, Run] = {}
        for name, counts in given.items():
            indices = indices_with(counts, shape.top_k)
            step = ExpertStep(indices, shape.hidden, shape.intermediate, shape.experts)
            runs[name] = timed(step.step)
        block = settings.clock.measure(f"loads, {shape}", runs)
        for name, counts in given.items():
            largest = int(counts.max()) / shape.rows
            low = f"{1e3 * block.times[name].low:.1f}"
            rows.append(
                [f"{shape}", name, f"{largest:.0%}", low, f"{block.ratio(name, BALANCED):.2f}"]
            )
    header = ["T, H, I, E, K", "load", "busiest expert", "ms", "over balanced"]
    return Section(
        "Skewed loads",
        "`expert_mlp` forward and backward with the experts given: the same number of rows in "
        "all, either balanced, or half of them on one expert, or as 1 / rank (Zipf).",
        [table(header, rows, texts=2)],
    )
