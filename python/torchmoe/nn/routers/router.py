"""The router: from tokens to logits."""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor, nn

from torchmoe import ops
from torchmoe._checks import (
    Fixed,
    Level,
    check_at_least,
    check_device,
    check_dtype,
    check_flag,
)
from torchmoe._wide import wide_dtype
from torchmoe.nn._first_values import whole_tensors
from torchmoe.nn._rows import widened
from torchmoe.nn.routers._usage import UsageTracking
from torchmoe.nn.routers.context_router import RouterOutput


class Router(UsageTracking):
    """A linear map to one logit per expert, with optional noise for exploration.

    The noise is drawn in training mode only, from torch's default generator, so that activation
    checkpointing replays it.

    Args:
        hidden_size: H.
        num_experts: E.
        bias: adds a learned bias to the logits.
        input_jitter: eps; the router sees x times a factor drawn uniformly from [1 - eps, 1 + eps]
            per entry (Switch Transformer, arXiv 2101.03961). The experts see x itself.
        logit_noise: standard deviation of Gaussian noise added to the logits (after Shazeer et al.,
            arXiv 1701.06538). The noisy logits are the layer's logits: ranking, weights and losses
            use them; `load_loss` also uses the logits before noise.
        usage_scaling: multiplies the gradient of expert i's row of `weight` by 1 - usage_i, so that
            experts in frequent use learn to attract tokens more slowly. It needs `usage`.
        track_usage: keeps `usage`, which `MoE.update` moves, for the parts that read it: a dynamic
            capacity, assistance, or the balancing loss with fractions from history.
        device: where the parameters are made.
        dtype: their dtype.

    Attributes:
        weight: [E, H] parameter.
        bias: [E] parameter, or None.
        usage: [E] buffer, float32 or wider, or None: running average of each expert's share of the
            slots, 1 / E at first.
        usage_decay: weight of the past in that average, 0.99.

    Raises:
        ValueError: a size is below 1, or a noise level negative or not finite.
    """

    hidden_size = Fixed[int]()
    num_experts = Fixed[int]()
    input_jitter = Level()
    logit_noise = Level()
    _input_jitter: float | None
    _logit_noise: float | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        bias: bool = False,
        input_jitter: float = 0.0,
        logit_noise: float = 0.0,
        usage_scaling: bool = False,
        track_usage: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("Router", "hidden_size", hidden_size, 1)
        check_at_least("Router", "num_experts", num_experts, 1)
        check_flag("Router", "bias", bias)
        check_device("Router", device)
        check_dtype("Router", dtype)
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.input_jitter = input_jitter
        self.logit_noise = logit_noise

        self.weight = nn.Parameter(
            torch.empty(num_experts, hidden_size, device=device, dtype=dtype)
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.register_usage(
            usage_scaling=usage_scaling, track_usage=track_usage, device=device, dtype=dtype
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weight and bias as nn.Linear does, within 1 / sqrt(H); sets usage to 1 / E."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        with whole_tensors(self):
            nn.init.uniform_(self.weight, -bound, bound)
            if self.bias is not None:
                nn.init.uniform_(self.bias, -bound, bound)
        self.reset_usage()

    @property
    def tells_noise(self) -> bool:  # type: ignore[override]
        """Whether noise is added to the logits; `forward` returns it if as_output=True."""
        # The forward of a subclass may take x alone.
        return (
            self.training and self._logit_noise is not None and type(self).forward is Router.forward
        )

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, *, as_output: bool) -> Tensor | RouterOutput: ...
    def forward(self, x: Tensor, *, as_output: bool = False) -> Tensor | RouterOutput:
        """The logits of each token.

        Args:
            x: [T, H] in the dtype of weight, or a narrower one.
            as_output: returns a `RouterOutput`, which also has the logits before noise and the
                noise's deviation.

        Returns:
            logits [T, E], float32 (float64 for float64), also under autocast.
        """
        weight = self.scale_by_usage(self.weight)
        bias: Tensor | None = self.bias
        if self.training and (eps := self._input_jitter) is not None:
            # In bfloat16 a factor near 1 would be rounded away; router_logits is float32 inside
            # anyway.
            wide = wide_dtype(x.dtype, weight.dtype)
            jitter = torch.empty_like(x, dtype=wide)
            x = x * jitter.uniform_(1 - eps, 1 + eps)
            weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
        clean = ops.router_logits(widened(x, weight), weight, bias)
        if not self.training or (deviation := self._logit_noise) is None:
            return RouterOutput(clean) if as_output else clean
        logits = clean + deviation * torch.randn_like(clean)
        if not as_output:
            return logits
        return RouterOutput(logits, clean_logits=clean, noise_deviation=deviation)

    def extra_repr(self) -> str:
        """The sizes and whatever differs from the defaults."""
        parts = [f"hidden_size={self.hidden_size}", f"num_experts={self.num_experts}"]
        if self.bias is not None:
            parts.append("bias=True")
        if self.input_jitter:
            parts.append(f"input_jitter={self.input_jitter}")
        if self.logit_noise:
            parts.append(f"logit_noise={self.logit_noise}")
        return ", ".join([*parts, *self.usage_repr()])
