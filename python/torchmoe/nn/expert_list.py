"""Experts of any shape: one module each."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn

from torchmoe import ops
from torchmoe._checks import check_module, check_not_batched, check_output, shown
from torchmoe.nn._first_values import reset_all
from torchmoe.nn._part import Part
from torchmoe.nn.declarations import ExpertsDeclaration


class ExpertList(ExpertsDeclaration, Part):
    """Any modules as experts. Each is called on its own tokens [n, H] and returns [n, H].

    Every expert runs in every forward pass, even on no rows, so that each parameter always gets a
    gradient and DistributedDataParallel never waits for one. An expert must therefore accept an
    input of shape [0, H].

    The number of rows of each expert is read back from the device. Unlike `Experts`, this waits for
    the GPU, does not work with torch.compile(fullgraph=True), and refuses ids that differ between
    the samples of torch.func.vmap.

    Args:
        modules: the experts, in the order of their ids.

    Attributes:
        experts: the nn.ModuleList of them.

    Raises:
        TypeError: an expert is not a module.
        ValueError: there is no expert.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        if not isinstance(modules, Iterable) or isinstance(modules, str):
            raise TypeError(f"ExpertList: modules must be modules, got {shown(modules)}")
        modules = list(modules)
        for module in modules:
            check_module("ExpertList", "modules", module)
        self.experts = nn.ModuleList(modules)
        if not self.experts:
            raise ValueError("ExpertList: modules must hold at least one module, got none")

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.experts)

    def reset_parameters(self) -> None:
        """Calls reset_parameters of every submodule that has one."""
        reset_all(self.experts)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            x: [T, H].
            indices: [T, K] int64; an id outside [0, E) is not routed.
            weights: [T, K].

        Returns:
            y [T, H] in the dtype that the experts return.

        Raises:
            RuntimeError: indices are a batch of torch.func.vmap.
        """
        check_not_batched("ExpertList", "indices", "hold values that can be read back", indices)
        # 1. Sort the tokens by expert; rows of unrouted slots are zero and come last.
        plan = ops.dispatch_plan(indices, self.num_experts)
        rows = ops.permute(x, plan)  # [N, H]
        # 2. Each expert on its own rows.
        offsets = plan.expert_offsets.tolist()
        outputs = [
            check_output(
                "ExpertList",
                "modules",
                expert(rows[begin:end]),
                (end - begin, rows.shape[1]),
                "[num_rows, hidden_size]",
                rows.device,
            )
            for expert, (begin, end) in zip(self.experts, pairwise(offsets), strict=True)
        ]
        rest = outputs[0].new_zeros(rows.shape[0] - offsets[-1], rows.shape[1])
        # 3. Bring the rows back and add them up.
        return ops.unpermute(torch.cat([*outputs, rest]), weights, plan)
