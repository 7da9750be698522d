"""What a mutant's reader would tell: for those that only a reference shows, the correct layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from certify.layers.correct import BASES
from certify.mutants.registry import Mutant
from torchmoe import Adapter


def adapter_of(mutant: Mutant) -> Adapter | None:
    """The base with the mutant's parameters as reference, where nothing else tells them apart."""
    if not mutant.needs_reference or mutant.base == "injected":
        return None  # the surrogate of an injected loss tells what its gradient is
    layer, options = BASES[mutant.base]
    plain = layer(**options)

    def reference(module: nn.Module, x: Tensor) -> Any:
        plain.to(x.dtype).train(module.training)
        state = dict(module.named_parameters()) | dict(module.named_buffers())
        return torch.func.functional_call(plain, state, (x,))

    return Adapter(reference=reference)
