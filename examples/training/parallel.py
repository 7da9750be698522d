"""Data-parallel training under torchrun: every process takes its share of each batch's windows.

The numbers are those of one process with the whole batch, up to rounding: gradients are averaged,
and the experts' layers sum over the processes what their balance is formed from. Capacity alone is
each process's own, for its own share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """The processes that train together, usually one."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def device(self, kind: str) -> torch.device:
        """Where this process computes."""
        return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")) if kind == "cuda" else 0)

    def share(self, rows: int) -> slice:
        """The rows of a batch that are this process's."""
        each = rows // self.count
        return slice(self.rank * each, (self.rank + 1) * each)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass averages gradients over the processes."""
        if self.count == 1:
            return model
        # Buffers move in model.update, which sums over the processes by itself.
        return DistributedDataParallel(model, broadcast_buffers=False)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, the same in each."""
        if self.count > 1:
            values = values.detach().clone()
            dist.all_reduce(values)
        return values

    def agree(self, *values: float) -> list[float]:
        """The largest of each value, so that all processes decide alike."""
        if self.count == 1:
            return list(values)
        largest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def wait(self) -> None:
        """Returns once every process is here."""
        if self.count > 1:
            barrier = dist.barrier(async_op=True)
            barrier.wait()
            barriers.append(barrier)


ALONE = Processes()
# Kept until the interpreter ends. Else a thread of gloo may be the last to hold one, and abort the
# process when it lets go of it while the interpreter is on its way out.
barriers: list[dist.Work] = []


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """The group that torchrun started, or this process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    # gloo next to NCCL, for the few values that stay on the CPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
