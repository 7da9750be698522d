"""Sharded parameters, as `torch.distributed.fsdp.fully_shard` makes them.

Inside the forward pass of a module that FSDP shards they are plain tensors; outside they are
DTensors. torch.distributed.tensor takes long to load and is not loaded here: a tensor with the
attribute `full_tensor` counts as a DTensor.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def full(tensor: Tensor) -> Tensor:
    """The tensor itself, or a DTensor gathered, for which every process of its mesh must call."""
    if not is_sharded(tensor):
        return tensor
    if tensor.is_meta:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    held = cast(Any, tensor)
    # With the parameters offloaded the processes still speak to each other through the device.
    whole: Tensor = held.to(held.device_mesh.device_type).full_tensor()
    return whole.to(held.device)


def gathers_in_forward(module: nn.Module) -> bool:
    """Whether the parameters are to be used through the module's forward pass alone.

    In a recomputation FSDP may leave them whole afterwards, so that they do not tell.
    """
    is_unit = any(hasattr(part, "unshard") for part in module.modules())
    return is_unit or any(is_sharded(parameter) for parameter in module.parameters())


def refuse_sharded(owner: str, argument: str, module: nn.Module) -> None:
    """Raises TypeError if a parameter is a DTensor; for tools that copy a module and call it."""
    for name, parameter in module.named_parameters():
        if is_sharded(parameter):
            raise TypeError(
                f"{owner}: {argument} must not be sharded, as one that loads its full state dict "
                f"is not, got a DTensor as {name}"
            )
