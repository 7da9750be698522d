"""Parameters of which a process holds a part, as `torch.distributed.fsdp.fully_shard` makes them.

Inside the forward pass of a module that FSDP shards they are plain tensors; outside they are
DTensors. torch.distributed.tensor takes long to load and is not loaded here: a tensor that has
`full_tensor` is one of its.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def full(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a DTensor, which every process of its mesh must ask for."""
    if not is_sharded(tensor):
        return tensor
    if tensor.is_meta:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    held = cast(Any, tensor)
    # With the parameters offloaded the processes still speak to each other through the device.
    whole: Tensor = held.to(held.device_mesh.device_type).full_tensor()
    return whole.to(held.device)
