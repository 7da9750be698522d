"""Experts that serve every token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchmoe._wide import wide
from torchmoe.nn.experts import Experts


class SharedExperts(nn.Module):
    """A feed-forward network like one expert of `Experts`, for `MoE(shared_experts=...)`.

    Several shared experts equal one whose width is their sum (DeepSeekMoE, arXiv 2401.06066).

    Args:
        hidden_size: H.
        intermediate_size: the inner width.
        activation: see `Experts`.
        bias: see there.
        device: where the parameters are made.
        dtype: their dtype.

    Attributes:
        experts: the network, as `Experts` with a single expert.

    Raises:
        ValueError: a size is below 1 or the activation is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.experts = Experts(
            hidden_size,
            intermediate_size,
            1,
            activation=activation,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """The network's output.

        Args:
            x: [T, H] in the dtype of the parameters.

        Returns:
            [T, H] in the dtype of x (under autocast, in the autocast dtype).
        """
        first = torch.zeros((x.shape[0], 1), dtype=torch.int64, device=x.device)
        weights = wide(torch.ones_like(first, dtype=x.dtype))
        y: Tensor = self.experts(x, first, weights)
        return y
