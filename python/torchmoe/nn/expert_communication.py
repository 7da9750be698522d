"""Communicating experts: a token's experts see each other's outputs before they are added up."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchmoe import ops
from torchmoe._checks import (
    Fixed,
    check_at_least,
    check_device,
    check_dtype,
    check_experts,
    check_output,
)
from torchmoe._wide import wide
from torchmoe.nn._first_values import reset, whole_tensors
from torchmoe.nn._part import Part
from torchmoe.nn._rows import exponentials, in_slot_order, linear
from torchmoe.nn.declarations import ExpertsDeclaration, declared_by_experts
from torchmoe.nn.estimators.estimator import ExpertFunction


class ExpertCommunication(ExpertsDeclaration, Part):
    """Experts of any kind whose outputs exchange information between the slots of a token.

        o_j = E_{i_j}(x), the output of slot j
        c_j = attention of slot j over the token's routed slots: queries, keys and values are linear
              in o / rms(o)
        y   = sum over j of w_j (o_j + W_out c_j)

    W_out starts at 0, so the layer starts out as the same layer without communication. Slots that
    are not routed take no part. A token with fewer than two routed slots gets sum w_j o_j, so with
    top_k = 1 communication has no effect. The two projections take 6 T K H S and 2 T H S FLOPs in
    the forward pass, S = size. The inputs and outputs of all slots, [T K, H] each, are kept for the
    backward pass.

    It replaces the experts that it wraps: MoE(..., experts=ExpertCommunication(Experts(...))). It
    cannot be used with an estimator that needs the output of each expert alone.

    Args:
        experts: anything called as experts(x, indices, weights) -> y [T, H].
        hidden_size: H.
        num_experts: E.
        size: width of the queries, keys and values, over all heads together.
        num_heads: attention heads, a divisor of size.
        device: where the parameters are made.
        dtype: their dtype.

    Attributes:
        experts: see above.
        qkv_proj: [3 * size, H] parameter.
        out_proj: [H, size] parameter.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1, num_heads does not divide size, or the experts declare other
            sizes or that they mix slots.
    """

    # An expert's output depends on the token's other experts, which estimators that need the output
    # of each expert alone check.
    mixes_slots = True
    hidden_size = Fixed[int]()
    num_experts = Fixed[int]()
    size = Fixed[int]()
    num_heads = Fixed[int]()

    def __init__(
        self,
        experts: ExpertFunction,
        hidden_size: int,
        num_experts: int,
        *,
        size: int = 32,
        num_heads: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("hidden_size", hidden_size),
            ("num_experts", num_experts),
            ("size", size),
            ("num_heads", num_heads),
        ):
            check_at_least("ExpertCommunication", name, value, 1)
        if size % num_heads:
            raise ValueError(
                f"ExpertCommunication: num_heads must divide size {size}, got {num_heads}"
            )
        check_device("ExpertCommunication", device)
        check_dtype("ExpertCommunication", dtype)
        check_experts("ExpertCommunication", experts)
        if declared_by_experts(experts).mixes_slots:
            raise ValueError(
                "ExpertCommunication: experts must not mix a token's slots themselves, "
                f"got {type(experts).__name__}"
            )
        for name, expected in (("hidden_size", hidden_size), ("num_experts", num_experts)):
            if (actual := getattr(experts, name, expected)) != expected:
                raise ValueError(
                    f"ExpertCommunication: experts must have {name} {expected}, got {actual}"
                )
        self.experts = experts
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.size = size
        self.num_heads = num_heads

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.qkv_proj = parameter(3 * size, hidden_size)
        self.out_proj = parameter(hidden_size, size)
        self._reset_own()

    def reset_parameters(self) -> None:
        """Draws the projections as nn.Linear does, sets W_out to 0, and resets the experts."""
        self._reset_own()
        reset(self.experts)

    def _reset_own(self) -> None:
        bound = 1.0 / math.sqrt(self.hidden_size)
        with whole_tensors(self):
            nn.init.uniform_(self.qkv_proj, -bound, bound)
            nn.init.zeros_(self.out_proj)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts, after they have communicated.

        Args:
            x: [T, H] in the dtype of the parameters.
            indices: [T, K] int64; an id outside [0, E) is not routed.
            weights: [T, K].

        Returns:
            y [T, H] in the dtype that the experts return.
        """
        routed = (indices >= 0) & (indices < self.num_experts)  # [T, K]
        plan = in_slot_order(indices.shape[0], indices.shape[1], indices.device)
        # 1. Each slot's output: the experts see it as a token of its own with weight 1.
        alone = indices.reshape(-1, 1)  # [N, 1]
        outputs = check_output(
            "ExpertCommunication",
            "experts",
            self.experts(ops.permute(x, plan), alone, weights.new_ones(alone.shape)),
            (alone.shape[0], x.shape[1]),
            "[num_slots, hidden_size]",
            x.device,
        )  # [N, H]
        # 2. What the slots of a token exchange.
        said = self._exchange(outputs, routed)  # [N, S]
        # 3. Add up. The last projection is the same for all slots, so that it comes after the sum.
        weights = weights.masked_fill(~routed, 0)
        y = ops.unpermute(outputs, weights, plan)
        heard = ops.unpermute(said, weights.to(said.dtype), plan)  # [T, S]
        return y + linear(heard.to(self.out_proj.dtype), self.out_proj).to(y.dtype)

    def _exchange(self, outputs: Tensor, routed: Tensor) -> Tensor:
        """What each slot receives: [N, S], float32 or wider, 0 without another routed slot."""
        qkv = wide(linear(outputs, self.qkv_proj))  # [N, 3 * S]
        # A row's length only scales its product, so that no normed copy [N, H] is kept.
        length = torch.linalg.vector_norm(outputs, dim=-1, keepdim=True, dtype=qkv.dtype)
        rms = (length.square() / self.hidden_size + torch.finfo(qkv.dtype).eps).sqrt()  # [N, 1]
        slots = (qkv / rms).view(*routed.shape, 3, self.num_heads, self.size // self.num_heads)
        q, k, v = slots.permute(2, 0, 3, 1, 4)  # [T, heads, K, D] each
        talks = (routed.sum(dim=1, keepdim=True) > 1) & routed  # [T, K]
        # Sums of products, since torch.matmul has other bits for other numbers of threads.
        scores = (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1) / math.sqrt(q.shape[-1])
        powers = exponentials(scores, talks[:, None, None, :])
        attention = powers / powers.sum(dim=-1, keepdim=True)
        said = (attention.unsqueeze(-1) * v.unsqueeze(2)).sum(3)  # [T, heads, K, D]
        heard: Tensor = said.transpose(1, 2).masked_fill(~talks[:, :, None, None], 0)
        return heard.reshape(-1, self.size)

    def extra_repr(self) -> str:
        """The sizes, and experts that are no module."""
        text = (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, size={self.size}, "
            f"num_heads={self.num_heads}"
        )
        is_module = isinstance(self.experts, nn.Module)
        return text if is_module else text + f", experts={self.experts!r}"
