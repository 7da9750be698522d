"""A warning for training loops that never call `MoE.update`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from torchmoe._recomputation import in_backward

_PASSES = 100


class UpdateReminder:
    """Warns once if parts of the layer read state that nothing updates.

    It counts forward passes in training until `update` is called for the first time; recomputations
    and passes under a compiler do not count. It is not part of the layer's state.

    Attributes:
        readers: the parts that read something `update` moves; without any, nothing is counted.
    """

    def __init__(self) -> None:
        self.readers: Sequence[str] = ()
        self._left = _PASSES

    def count(self) -> None:
        """Counts a forward pass in training mode."""
        if torch.compiler.is_compiling():
            return  # a number that is looked at compiles the graph anew
        if not self._left or not self.readers or in_backward() or not torch.is_grad_enabled():
            return
        self._left -= 1
        if not self._left:
            warnings.warn(
                f"MoE: update must be called once per optimizer step for {self.readers[0]}, got "
                f"{_PASSES} forward passes in training without: moe.update(moe(x).routing)",
                stacklevel=2,
            )

    def stop(self) -> None:
        """Nothing more is said."""
        self._left = 0
