"""The stacked experts: one tensor for each matrix of all experts, one op for all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchmoe import ops
from torchmoe._checks import (
    Fixed,
    check_at_least,
    check_choice,
    check_device,
    check_dtype,
    check_flag,
)
from torchmoe.nn._first_values import whole_tensors
from torchmoe.nn._part import Part
from torchmoe.nn.declarations import ExpertsDeclaration


class Experts(ExpertsDeclaration, Part):
    """E feed-forward networks of one shape, in the layout of Hugging Face Transformers v5.

    A gated expert is down_proj(act(gate) * up), a plain one down_proj(act(up)); see
    `torchmoe.ops.expert_mlp`.

    Args:
        hidden_size: H.
        intermediate_size: I.
        num_experts: E.
        activation: one of `torchmoe.ops.ACTIVATIONS`; see `torchmoe.ops.expert_mlp`.
        bias: gives both projections a learned bias.
        device: where the parameters are made.
        dtype: their dtype.

    Attributes:
        gate_up_proj: [E, 2 * I, H], the gate's rows first (gated activations).
        gate_up_proj_bias: [E, 2 * I] or None.
        up_proj: [E, I, H] (plain activations).
        up_proj_bias: [E, I] or None.
        down_proj: [E, H, I].
        down_proj_bias: [E, H] or None.

    Raises:
        ValueError: a size is below 1 or the activation is unknown.
    """

    hidden_size = Fixed[int]()
    intermediate_size = Fixed[int]()
    num_experts = Fixed[int]()
    activation = Fixed[str]()
    down_proj: nn.Parameter
    down_proj_bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("Experts", "hidden_size", hidden_size, 1)
        check_at_least("Experts", "intermediate_size", intermediate_size, 1)
        check_at_least("Experts", "num_experts", num_experts, 1)
        check_choice("Experts", "activation", activation, ops.ACTIVATIONS)
        check_flag("Experts", "bias", bias)
        check_device("Experts", device)
        check_dtype("Experts", dtype)
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_experts, self.activation = num_experts, activation

        gated = activation in ops.GATED_ACTIVATIONS
        inner = 2 * intermediate_size if gated else intermediate_size
        shapes: dict[str, tuple[int, ...] | None] = {
            self._in_name: (num_experts, inner, hidden_size),
            self._in_name + "_bias": (num_experts, inner) if bias else None,
            "down_proj": (num_experts, hidden_size, intermediate_size),
            "down_proj_bias": (num_experts, hidden_size) if bias else None,
        }
        for name, shape in shapes.items():
            parameter = None
            if shape is not None:
                parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        self.reset_parameters()

    @property
    def _in_name(self) -> str:
        return "gate_up_proj" if self.activation in ops.GATED_ACTIVATIONS else "up_proj"

    def reset_parameters(self) -> None:
        """Draws every expert as nn.Linear does: uniform within 1 / sqrt(fan_in)."""
        fan_ins = {self._in_name: self.hidden_size, "down_proj": self.intermediate_size}
        with whole_tensors(self):
            for name, fan_in in fan_ins.items():
                bound = 1.0 / math.sqrt(fan_in)
                for tensor in (getattr(self, name), getattr(self, name + "_bias")):
                    if tensor is not None:
                        nn.init.uniform_(tensor, -bound, bound)

    def forward(
        self, x: Tensor, indices: Tensor, weights: Tensor, probs: Tensor | None = None
    ) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            x: [T, H] in the dtype of the parameters.
            indices: [T, K] int64; an id outside [0, E) is not routed.
            weights: [T, K].
            probs: [T, E] or None; gets the gradient of `attach_dense_gradient`.

        Returns:
            y [T, H] in the dtype of x (under autocast, in the autocast dtype).
        """
        y = ops.expert_mlp(x, indices, weights, *self._weights, self.activation)
        return y if probs is None else self.attach_dense_gradient(y, probs, x)

    def attach_dense_gradient(self, y: Tensor, probs: Tensor, x: Tensor) -> Tensor:
        """A copy of y whose backward pass gives probs <dL/dy, E_i(x)> for all experts.

        See `torchmoe.ops.attach_dense_gradient`. If FSDP shards the experts they are whole only in
        `forward`, which does the same with its result if it is given probs.

        Args:
            y: [T, H], what `forward` returned.
            probs: [T, E].
            x: [T, H] in the dtype of the parameters.

        Returns:
            [T, H] in the dtype of y.
        """
        return ops.attach_dense_gradient(y, probs, x, *self._weights, self.activation)

    @property
    def _weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """w_in, b_in, w_out and b_out, as the ops call them."""
        w_in: Tensor = getattr(self, self._in_name)
        b_in: Tensor | None = getattr(self, self._in_name + "_bias")
        return w_in, b_in, self.down_proj, self.down_proj_bias

    def extra_repr(self) -> str:
        """The sizes and the activation."""
        text = (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"num_experts={self.num_experts}, activation={self.activation!r}"
        )
        return text if self.down_proj_bias is None else text + ", bias=True"
