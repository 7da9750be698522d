"""Experts as directions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from torchmoe import ops
from torchmoe._checks import (
    Checked,
    Fixed,
    check_at_least,
    check_device,
    check_dtype,
    check_positive,
)
from torchmoe._wide import wide
from torchmoe.nn._first_values import whole_tensors
from torchmoe.nn._rows import widened
from torchmoe.nn._sharding import full
from torchmoe.nn.routers._usage import UsageTracking


class CosineRouter(UsageTracking):
    """Logits by direction alone: the cosine of a token and an expert in a space of few dimensions.

        logit_i = cos(A x, e_i) / tau,   tau = max(exp(log_temperature), min_temperature)

    A is a projection, e_i the expert's embedding. Neither length matters, so tokens have no reason
    to gather around the experts' embeddings (X-MoE, Chi et al., arXiv 2204.09179). At the minimum
    of tau, log_temperature gets no gradient and tau stays there.

    If the router is sharded, `temperature`, `directions`, `rows`, `project` and
    `match_percentages`, called outside its forward pass, gather its parameters; all processes must
    call them.

    Args:
        hidden_size: H.
        num_experts: E.
        projection_size: P, the dimensions of the space; None is half the number of experts,
            at least 2.
        temperature: the initial tau. Logits are in [-1 / tau, 1 / tau].
        min_temperature: the minimum of tau.
        usage_scaling: multiplies the gradient of expert i's row of `embeddings` by 1 - usage_i, see
            `Router`.
        track_usage: keeps `usage`, see `Router`.
        device: where the parameters are made.
        dtype: their dtype.

    Attributes:
        projection: [P, H] parameter, P = projection_size.
        embeddings: [E, P] parameter.
        log_temperature: [1] parameter; `fully_shard` cannot shard a scalar, as which a state dict
            may also have it.
        usage: [E] buffer or None, see `Router`.
        usage_decay: weight of the past in it, 0.99.

    Raises:
        ValueError: a size is below 1, or not 0 < min_temperature <= temperature.
    """

    hidden_size = Fixed[int]()
    num_experts = Fixed[int]()
    projection_size = Fixed[int]()
    min_temperature = Checked(check_positive)

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        projection_size: int | None = None,
        temperature: float = 0.3,
        min_temperature: float = 0.01,
        usage_scaling: bool = False,
        track_usage: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("CosineRouter", "hidden_size", hidden_size, 1)
        check_at_least("CosineRouter", "num_experts", num_experts, 1)
        if projection_size is None:
            projection_size = max(2, num_experts // 2)
        check_at_least("CosineRouter", "projection_size", projection_size, 1)
        check_positive("CosineRouter", "temperature", temperature)
        check_device("CosineRouter", device)
        check_dtype("CosineRouter", dtype)
        self.min_temperature = min_temperature
        if temperature < min_temperature:
            raise ValueError(
                f"CosineRouter: temperature must be at least min_temperature {min_temperature}, "
                f"got {temperature}"
            )
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.projection_size = projection_size
        self._first_temperature = temperature

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.projection = parameter(projection_size, hidden_size)
        self.embeddings = parameter(num_experts, projection_size)
        self.log_temperature = parameter(1)
        self.register_usage(
            usage_scaling=usage_scaling, track_usage=track_usage, device=device, dtype=dtype
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the projection as nn.Linear does and random embeddings; sets tau and usage."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        with whole_tensors(self):
            nn.init.uniform_(self.projection, -bound, bound)
            nn.init.normal_(self.embeddings)
            nn.init.constant_(self.log_temperature, math.log(self._first_temperature))
        self.reset_usage()

    @property
    def temperature(self) -> Tensor:
        """Tau, a scalar, float32 or wider."""
        log_temperature = wide(full(self.log_temperature)).squeeze(0)
        return log_temperature.exp().clamp(min=self.min_temperature)

    def project(self, x: Tensor) -> Tensor:
        """The tokens' directions.

        Args:
            x: [T, H] in the dtype of the parameters, or a narrower one.

        Returns:
            [T, P], float32 or wider, each of length 1 (0 for a token that projects to 0).
        """
        projection = full(self.projection)
        return unit(ops.router_logits(widened(x, projection), projection))

    @property
    def directions(self) -> Tensor:
        """The experts' embeddings at length 1: [E, P], float32 or wider."""
        return unit(wide(self.scale_by_usage(full(self.embeddings))))

    @property
    def rows(self) -> Tensor:
        """What `project` is multiplied by, directions / tau: [E, P]."""
        # One factor for each expert: the gradient of a single factor would be a sum over all
        # elements, which depends on the number of threads.
        factor = self.temperature.reciprocal().expand(self.num_experts)
        return factor.unsqueeze(1) * self.directions

    def forward(self, x: Tensor) -> Tensor:
        """The logits of each token.

        Args:
            x: [T, H] in the dtype of the parameters, or a narrower one.

        Returns:
            logits [T, E], float32 (float64 for float64), also under autocast.
        """
        return ops.router_logits(self.project(x), self.rows)

    @torch.no_grad()
    def match_percentages(self, x: Tensor) -> Tensor:
        """How well each expert's direction matches each token's, in percent.

        Args:
            x: [T, H] in the dtype of the parameters, or a narrower one.

        Returns:
            [T, E], 50 (1 + cosine): 100 % the same direction, 50 % unrelated, 0 % the opposite one.
        """
        return percent(ops.router_logits(self.project(x), self.directions))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        *args: Any,  # noqa: ANN401 (torch's own)
    ) -> None:
        given = state_dict.get(name := prefix + "log_temperature")
        if isinstance(given, Tensor) and given.dim() == 0:
            state_dict[name] = given.detach().reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """The sizes and whatever differs from the defaults."""
        parts = [
            f"hidden_size={self.hidden_size}",
            f"num_experts={self.num_experts}",
            f"projection_size={self.projection_size}",
            f"min_temperature={self.min_temperature}",
        ]
        return ", ".join([*parts, *self.usage_repr()])


def unit(vectors: Tensor) -> Tensor:
    """The vectors [..., G] at length 1; a zero vector stays one, with the identity's gradient."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / lengths.where(lengths > 0, 1)


def percent(cosine: Tensor) -> Tensor:
    """A match in percent: 0 for opposite directions, 50 for unrelated ones, 100 for equal ones."""
    return 50 * (1 + cosine.clamp(-1, 1))
