"""Do sizes that fill no vector and no tile fall off a cliff?"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.clock import Run, timed
from benchmarks.contenders import LOOP, OURS, loop_over_experts
from benchmarks.cpu.loads import ExpertStep, indices_with
from benchmarks.cpu.products import balanced_offsets
from benchmarks.cpu.section import Section, Settings
from benchmarks.markdown import table

SIZES = (17, 33, 100)
ROWS, EXPERTS, TOP_K = 2048, 8, 2
FEW_EXPERTS, FEW_SIZE = 64, 100


class LoopStep:
    """The plain loop on the operands of an ExpertStep, each expert with parameters of its own."""

    def __init__(self, ours: ExpertStep) -> None:
        """Takes the operands."""
        self.ours = ours
        self.w_in = [w.clone().requires_grad_() for w in ours.w_in.detach()]
        self.w_out = [w.clone().requires_grad_() for w in ours.w_out.detach()]

    def forward(self) -> Tensor:
        """The experts' weighted sum."""
        ours = self.ours
        return loop_over_experts(ours.x, ours.indices, ours.weights, self.w_in, self.w_out)

    def step(self) -> tuple[Tensor, ...]:
        """Every gradient."""
        leaves = (self.ours.x, self.ours.weights, *self.w_in, *self.w_out)
        return torch.autograd.grad(self.forward(), leaves, self.ours.grad)


def cases() -> dict[str, ExpertStep]:
    """Odd widths with rows enough, then experts with hardly a row."""
    full = balanced_offsets(ROWS, EXPERTS).diff()
    found = {
        f"H = {hidden}, I = {inner}": ExpertStep(indices_with(full, TOP_K), hidden, inner, EXPERTS)
        for hidden in SIZES
        for inner in SIZES
    }
    each = torch.ones(FEW_EXPERTS, dtype=torch.int64)
    every_other = each.clone()
    every_other[1::2] = 0
    none_but_one = each * 0
    none_but_one[0] = 1
    few = {
        f"{FEW_EXPERTS} experts, 1 row each": each,
        f"{FEW_EXPERTS} experts, 1 row or none": every_other,
        f"{FEW_EXPERTS} experts, 1 row in all": none_but_one,
    }
    for name, counts in few.items():
        found[name] = ExpertStep(indices_with(counts, 1), FEW_SIZE, FEW_SIZE, FEW_EXPERTS)
    return found


def section_odd_sizes(settings: Settings) -> Section:
    """The time of each, next to the plain loop's."""
    torch.manual_seed(0)
    rows: list[list[str]] = []
    for name, ours in cases().items():
        loop = LoopStep(ours)
        torch.testing.assert_close(ours.forward(), loop.forward())
        runs: dict[str, Run] = {OURS: timed(ours.step), LOOP: timed(loop.step)}
        block = settings.clock.measure(name, runs)
        low = [1e3 * block.times[who].low for who in runs]
        flops = 18 * ours.indices.numel() * ours.w_out[0].numel()
        share = flops / block.times[OURS].low / block.peak()
        ratio = block.ratio(LOOP, OURS)
        rows.append([name, f"{low[0]:.2f}", f"{low[1]:.2f}", f"{ratio:.2f}", f"{share:.3f}"])
    return Section(
        "Odd sizes",
        f"`expert_mlp` forward and backward next to the plain torch loop on the same operands: "
        f"{ROWS} rows of {EXPERTS} balanced experts, then {FEW_EXPERTS} experts of H = I = "
        f"{FEW_SIZE} with hardly a row, where the time is that of the weights' gradients.",
        [table(["", "ms", "loop ms", "loop over ours", "U"], rows)],
    )
