"""One decision for a whole sequence."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchmoe import ops
from torchmoe._checks import Fixed, check_choice
from torchmoe._wide import wide
from torchmoe.nn._first_values import whole_tensors
from torchmoe.nn._rows import exponentials, in_slot_order, widened
from torchmoe.nn.routers._wrapping import WrappingRouter
from torchmoe.nn.routers.context_router import RouterOutput, Scorer, score

POOLINGS = ("attention", "given", "mean", "first")


class SequenceRouter(WrappingRouter):
    """Pools the tokens of a sequence into one gate input, whose experts serve all its tokens.

        a = pooling weights of the counted tokens, which add up to 1
        g = sum over s of a_s x_s,   logits of every token of the sequence = router(g)

    | pooling | a_s |
    |---|---|
    | "attention" | softmax over s of <query, x_s> / sqrt(H); the query is learned, 0 at first |
    | "given" | router_input, the model's own attention, divided by its sum |
    | "mean" | the same for all |
    | "first" | 1 for the first counted token, such as CLS, 0 for the others |

    Except with "first", the decision depends on all tokens, so a causal language model cannot use
    it. Task-level routing: Kudugunta et al., arXiv 2110.03742.

    Args:
        router: scores the gate input: Router, CosineRouter, or any module [T, H] -> [T, E].
        pooling: see above.

    Attributes:
        router: see above.
        pooling: see above.
        query: [H] parameter with pooling "attention", else None.

    Raises:
        ValueError: pooling is unknown.
        TypeError: router is not a module that scores each token alone, or declares no sizes.
    """

    decides_for = "sequence"
    pooling = Fixed[str]()
    query: nn.Parameter | None

    def __init__(self, router: nn.Module, *, pooling: str = "attention") -> None:
        super().__init__(router)
        check_choice("SequenceRouter", "pooling", pooling, POOLINGS)
        self.pooling = pooling
        query = None
        if pooling == "attention":
            hidden_size = self._size("hidden_size", "in_features")
            like = next(router.parameters(), torch.zeros(()))
            query = nn.Parameter(torch.zeros(hidden_size, device=like.device, dtype=like.dtype))
        self.register_parameter("query", query)

    @property
    def looks_ahead(self) -> str | None:  # type: ignore[override]
        """None with pooling "first"; otherwise the reason."""
        if self.pooling == "first":
            return None
        pooling = self.pooling
        return f'with pooling "{pooling}" decides by all tokens of a sequence, later ones included'

    def reset_parameters(self) -> None:
        """Sets the query to 0, and gives the router inside its first values again."""
        with whole_tensors(self):
            if self.query is not None:
                nn.init.zeros_(self.query)
        super().reset_parameters()

    @property
    def scoring(self) -> nn.Module:  # type: ignore[override]
        """The router inside."""
        return self.router

    def forward(
        self,
        x: Tensor,
        router_input: Tensor | None = None,
        token_mask: Tensor | None = None,
        *,
        scorer: Scorer = score,
    ) -> RouterOutput:
        """The logits of each sequence, for every one of its tokens.

        Args:
            x: [..., S, H] in the dtype of the router's parameters.
            router_input: with pooling "given" the weights [..., S], >= 0; else None, or [..., S, H]
                to be pooled instead of x.
            token_mask: [..., S] bool, True = the token counts.
            scorer: what scores the gate inputs [B, H] with the router inside.

        Returns:
            logits [..., S, E], and in details "pooling_weights" [..., S], float32 or wider, and
            "gate_input" [..., H]. Both are 0 for a sequence in which no token counts.

        Raises:
            RuntimeError: a shape does not fit, or router_input is missing with pooling "given".
        """
        pooled = x
        if self.pooling == "given":
            if router_input is None or router_input.shape != x.shape[:-1]:
                got = "None" if router_input is None else f"shape {list(router_input.shape)}"
                raise RuntimeError(
                    "SequenceRouter: router_input must be the tokens' weights of shape "
                    f'{list(x.shape[:-1])} with pooling "given", got {got}'
                )
        elif router_input is not None:
            if router_input.dim() != x.dim():
                raise RuntimeError(
                    f"SequenceRouter: router_input must be vectors {[*x.shape[:-1], 'hidden_size']}"
                    f", to be pooled instead of x, got shape {list(router_input.shape)}"
                )
            pooled = router_input
        if pooled.dim() < 2:
            raise RuntimeError(
                "SequenceRouter: x must be [..., length, hidden_size], "
                f"got shape {list(pooled.shape)}"
            )
        leading, length = pooled.shape[:-2], pooled.shape[-2]
        sequences = math.prod(leading)
        mask = None if token_mask is None else token_mask.reshape(sequences, length)
        rows = pooled.reshape(sequences * length, pooled.shape[-1])
        # The tokens of a sequence are the slots of one choice among them.
        plan = in_slot_order(sequences, length, x.device)
        if router_input is not None and self.pooling == "given":
            values = wide(router_input.reshape(sequences, length))
        else:
            values = self._values(rows, sequences, length, mask)
        # The returned tensor is used to form the logits, so that its gradient can be taken.
        weights = _shares(values, mask, plan).view(*leading, length)
        gate_input = ops.unpermute(rows, weights.view(sequences, length), plan)  # [B, H]
        gate_input = gate_input.view(*leading, gate_input.shape[-1])
        scored = scorer(self.router, gate_input.view(sequences, gate_input.shape[-1]))  # [B, E]

        def for_every_token(logits: Tensor) -> Tensor:
            return ops.permute(logits, plan).view(*leading, length, self.num_experts)

        clean = scored.clean_logits
        return RouterOutput(
            for_every_token(scored.logits),
            details={"pooling_weights": weights, "gate_input": gate_input},
            clean_logits=None if clean is None else for_every_token(clean),
            noise_deviation=scored.noise_deviation,
        )

    def _values(self, rows: Tensor, sequences: int, length: int, mask: Tensor | None) -> Tensor:
        """What the pooling weights [B, S] of the tokens [B * S, H] are proportional to."""
        if self.query is not None:
            query = (self.query / math.sqrt(rows.shape[-1])).unsqueeze(0)
            scores = ops.router_logits(widened(rows, query), query).view(sequences, length)
            return exponentials(scores, mask) if length else scores
        ones = torch.ones((sequences, length), device=rows.device, dtype=wide(rows[:0]).dtype)
        if self.pooling == "mean":
            return ones
        counted = ones if mask is None else mask.to(ones.dtype)
        return ((counted.cumsum(dim=-1) == 1) & (counted > 0)).to(ones.dtype)

    def extra_repr(self) -> str:
        """The pooling."""
        return f"pooling={self.pooling!r}"


def _shares(values: Tensor, mask: Tensor | None, plan: ops.DispatchPlan) -> Tensor:
    """The counted values [B, S] over their sum in each row; 0 where that is 0."""
    if mask is not None:
        values = values.masked_fill(~mask, 0)
    # Both directions of torch's own sum over a long row, and the gradient of its softmax, depend on
    # the number of threads.
    rows = values.reshape(-1, 1)
    total = ops.unpermute(rows, torch.ones_like(values), plan)  # [B, 1]
    return (rows / ops.permute(total.where(total != 0, 1), plan)).view(values.shape)
