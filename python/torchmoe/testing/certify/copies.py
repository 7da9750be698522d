"""What is copied of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def gradients(layer: nn.Module) -> dict[str, Tensor | None]:
    """The gradients in .grad of the parameters that require one."""
    return {
        name: None if parameter.grad is None else parameter.grad.detach().clone()
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad
    }


def added(
    parts: Sequence[Mapping[str, Tensor | None]], factor: float = 1.0
) -> dict[str, Tensor | None]:
    """The sum of gradients times a factor, name by name; None where all are."""
    total: dict[str, Tensor | None] = {}
    for name in parts[0]:
        present = [part[name] for part in parts if part[name] is not None]
        total[name] = (
            factor * torch.stack([t for t in present if t is not None]).sum(0) if present else None
        )
    return total


def buffers(layer: nn.Module) -> dict[str, Tensor | None]:
    """Copies of the layer's buffers."""
    return {name: buffer.detach().clone() for name, buffer in layer.named_buffers()}


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch's ops."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
