"""The layer for models that pass on a single tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchmoe import ops
from torchmoe._checks import Checked, check_finite, shown
from torchmoe.nn._part import Part
from torchmoe.nn.moe import MoE
from torchmoe.nn.routing import Decision, MoEOutput


class WithAttachedLoss(Part):
    """A layer that returns only its hidden states, with its auxiliary loss attached to their graph.

    For nn.Sequential, and for models that you do not want to edit. The parameters get the same
    gradients as if aux_loss were added to the task loss. A forward hook on `moe` sees the whole
    `MoEOutput`, for `moe.update` and for logs.

    As `linear1` of nn.TransformerEncoderLayer, with nn.Identity as `linear2`, it works in training
    and in evaluation. torch's fused path reads the weights of `linear1` instead of calling it, but
    skips layers with hooks; an empty hook here keeps it off. Nested tensors, into which
    nn.TransformerEncoder turns its input in evaluation with a padding mask, are not supported: pass
    enable_nested_tensor=False to it.

    Args:
        moe: the layer, also if torch.compile or DistributedDataParallel has wrapped it.
        scale: the gradient that the auxiliary loss receives. It must be the factor of the task
            loss, if that has one: 1 / steps for gradient accumulation by division, the scaler's
            factor in mixed precision. May be changed at any time.

    Attributes:
        moe: the layer.
        scale: see above.

    Raises:
        TypeError: moe is not an MoE and holds none, or scale is not a number.
        ValueError: scale is not finite.
    """

    scale = Checked(check_finite)

    def __init__(self, moe: MoE, *, scale: float = 1.0) -> None:
        super().__init__()
        # A layer that is compiled or wrapped is one inside another module.
        if not isinstance(moe, nn.Module) or not any(isinstance(m, MoE) for m in moe.modules()):
            raise TypeError(f"WithAttachedLoss: moe must be a MoE, got {shown(moe)}")
        self.moe = moe
        self.scale = scale
        self.register_forward_pre_hook(_do_nothing)

    def forward(
        self,
        x: Tensor,
        *,
        token_mask: Tensor | None = None,
        earlier_counts: Tensor | None = None,
        router_input: Tensor | None = None,
        decision: Decision | None = None,
    ) -> Tensor:
        """The layer's hidden states; arguments as for MoE."""
        output: MoEOutput = self.moe(
            x,
            token_mask=token_mask,
            earlier_counts=earlier_counts,
            router_input=router_input,
            decision=decision,
        )
        if not isinstance(output, MoEOutput):
            raise TypeError(f"WithAttachedLoss: moe must return a MoEOutput, got {shown(output)}")
        # As a factor of the loss, not as the op's argument: a changed scale then compiles nothing.
        return ops.attach_loss(output.hidden_states, self.scale * output.aux_loss)

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        if name in ("weight", "bias"):
            raise AttributeError(
                f"WithAttachedLoss: {name} must be read from the parts of moe, there is none here; "
                "nn.TransformerEncoder reads it to make nested tensors, which "
                "enable_nested_tensor=False turns off"
            )
        return super().__getattr__(name)


def _do_nothing(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook whose presence alone keeps nn.TransformerEncoderLayer from its fused way."""
