"""Which formula in common use a layer's auxiliary loss is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchmoe.adapter import Reading

_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "normalised sigmoid": lambda logits: logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True),
}
_SHARES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "of all slots": lambda ids, experts: _counts(ids, experts) / ids.numel(),
    "of first choices": lambda ids, experts: _counts(ids[:, :1], experts) / len(ids),
}


def convention(readings: Sequence[Reading], experts: int | None, tolerance: float) -> str | None:
    """The words for c E sum f_i P_i, where one c explains the losses of all the readings."""
    if experts is None:
        return None
    for scores, score in _SCORES.items():
        for shares, share in _SHARES.items():
            factors = []
            for reading in readings:
                if reading.logits is None or reading.indices is None or reading.aux_loss is None:
                    return None
                mean = score(reading.logits.detach().double()).mean(0)
                value = experts * (share(reading.indices, experts) * mean).sum()
                factors.append(reading.aux_loss.detach().double() / value)
            ratios = torch.stack(factors)
            if bool((ratios - ratios[0]).abs().max() <= tolerance * ratios[0].abs()):
                return (
                    f"{ratios[0].item():.6g} E sum f_i P_i, f the shares {shares}, P the {scores}"
                )
    return None


def _counts(ids: Tensor, experts: int) -> Tensor:
    routed = ids[(ids >= 0) & (ids < experts)]
    return torch.bincount(routed, minlength=experts).double()
