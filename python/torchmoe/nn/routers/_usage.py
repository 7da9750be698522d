"""The experts' usage, which routers with a parameter for each expert have in common."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from torchmoe import ops
from torchmoe._checks import Checked, Fixed, check_counts, check_flag, check_share
from torchmoe._wide import wide, wide_dtype
from torchmoe.nn._buffers import Remembering
from torchmoe.nn.declarations import RouterDeclaration, declared_by_router

# Weight of the past in the running average: a memory of about a hundred steps.
_USAGE_DECAY = 0.99


class UsageTracking(RouterDeclaration, Remembering):
    """Keeps the running average of each expert's share of the slots, if asked to.

    Attributes:
        num_experts: E.
        usage: [E] buffer, float32 or wider, or None.
        usage_decay: weight of the past in that average, 0.99.
        usage_scaling: whether `scale_by_usage` does anything.
    """

    wide_buffers = ("usage",)
    num_experts: int
    usage: Tensor | None
    usage_decay = Checked(check_share)
    usage_scaling = Fixed[bool]()

    @property
    def keeps_usage(self) -> bool:  # type: ignore[override]
        """Whether there is `usage`."""
        return self.usage is not None

    @property
    def reads_usage(self) -> bool:  # type: ignore[override]
        """Whether `scale_by_usage` does anything."""
        return self.usage_scaling

    def register_usage(
        self,
        *,
        usage_scaling: bool,
        track_usage: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Creates the buffer, uninitialised, if one of the two flags is true.

        Args:
            usage_scaling: see `scale_by_usage`.
            track_usage: keeps usage for other readers.
            device: where the parameters are.
            dtype: their dtype.
        """
        owner = type(self).__name__
        self.usage_scaling = check_flag(owner, "usage_scaling", usage_scaling)
        check_flag(owner, "track_usage", track_usage)
        self.usage_decay = _USAGE_DECAY
        usage = None
        if usage_scaling or track_usage:
            usage = torch.empty(self.num_experts, device=device, dtype=wide_dtype(dtype))
        self.register_buffer("usage", usage)

    def reset_usage(self) -> None:
        """Sets usage to 1 / E."""
        if self.usage is not None:
            nn.init.constant_(self.usage, 1.0 / self.num_experts)

    def scale_by_usage(self, weight: Tensor) -> Tensor:
        """The weight [E, ...]; with usage_scaling the gradient of row i is times 1 - usage_i."""
        if not self.usage_scaling or self.usage is None:
            return weight
        return ops.scale_gradient(weight, (1 - wide(self.usage)).unsqueeze(-1))

    @torch.no_grad()
    def update(self, tokens_per_expert: Tensor, num_slots: Tensor) -> None:
        """Moves usage towards the shares of one step.

        Does nothing if no usage is kept, or if no token was counted.

        Args:
            tokens_per_expert: [E] integers: slots per expert, summed over micro-batches and
                processes.
            num_slots: integer scalar: their sum.

        Raises:
            TypeError: tokens_per_expert is not a tensor.
            RuntimeError: it has another shape or device.
            ValueError: a count is negative or not a number (checked on the CPU only).
        """
        if self.usage is None:
            return
        check_counts(
            type(self).__name__,
            "tokens_per_expert",
            tokens_per_expert,
            self.num_experts,
            self.usage.device,
        )
        usage = self.widened("usage")
        share = tokens_per_expert.to(usage.dtype) / num_slots.clamp(min=1)
        moved = self.usage_decay * usage + (1 - self.usage_decay) * share
        usage.copy_(torch.where(num_slots > 0, moved, usage))

    def usage_repr(self) -> list[str]:
        """What extra_repr shows of it."""
        if self.usage_scaling:
            return ["usage_scaling=True"]
        return [] if self.usage is None else ["track_usage=True"]


def usage_of(router: nn.Module) -> Tensor | None:
    """A router's usage, or None if it keeps none."""
    return cast(Tensor, router.usage) if declared_by_router(router).keeps_usage else None
