"""How long the graphs of a layer's passes live."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchmoe.testing.certify.subject import Subject


def graphs_alive(subject: Subject, layer: nn.Module, batches: Sequence[Tensor]) -> int:
    """How many passes' graphs still hold what they saved once all the passes are over."""
    counts = []
    for x in batches:
        own: list[weakref.ReferenceType[_Saved]] = []

        def pack(tensor: Tensor, own: list[Any] = own) -> _Saved:
            # Detached: the saved output of an op would hold the graph that holds it.
            saved = _Saved(tensor.detach())
            own.append(weakref.ref(saved))
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            subject.call(layer, x.detach().requires_grad_())
        counts.append(own)
    gc.collect()
    return sum(any(saved() is not None for saved in own) for own in counts)


class _Saved:
    """A tensor that a graph keeps, which can be referred to weakly."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
