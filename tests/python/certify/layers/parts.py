"""What small MoE layers in plain torch are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 6, 5, 4, 2


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def flatten(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens [T, hidden] and which of them are real [T]."""
    tokens = x.reshape(-1, x.shape[-1])
    if mask is None:
        return tokens, torch.ones(len(tokens), dtype=torch.bool, device=x.device)
    return tokens, mask.reshape(-1)


def project(tokens: Tensor, weight: Tensor) -> Tensor:
    """The router's logits, in float32 at least, under autocast too."""
    with torch.autocast(tokens.device.type, enabled=False):
        return F.linear(wide(tokens), wide(weight))


def assignments(chosen: Tensor, experts: int) -> Tensor:
    """How often each token chose each expert, [T, E]; -1 chooses none."""
    return (chosen.unsqueeze(-1) == torch.arange(experts, device=chosen.device)).sum(1)


class Expert(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, intermediate, bias=False)
        self.up = nn.Linear(hidden, intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def inner(self, x: Tensor) -> Tensor:
        """What `down` gets."""
        return F.silu(self.gate(x)) * self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        """The expert's output."""
        return self.down(self.inner(x))
