"""Experts that pick their tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchmoe import ops
from torchmoe._checks import Fixed, check_among, check_choice
from torchmoe._wide import wide
from torchmoe.capacity import expert_capacity
from torchmoe.nn.routers._wrapping import WrappingRouter
from torchmoe.nn.routers.context_router import RouterOutput, score
from torchmoe.ops import SCORE_FUNCTIONS

AMONG = ("batch", "sequence")


class ExpertChoiceRouter(WrappingRouter):
    """Every expert picks the tokens that it scores highest, the same number for each expert.

    An expert picks ceil(top_k T / E) tokens by score_function(logits); ties go to the earlier token
    (logits decide where the scores underflow). The load is therefore even by construction. A token
    gets top_k experts on average: none, some, or all (Zhou et al., arXiv 2202.09368). The weights
    are the scores themselves unless the gate sets a normalisation.

    Whether an expert picks a token depends on all other tokens that it could pick (with `among`
    "batch" also on the other sequences), so a causal language model cannot use it.

    Args:
        router: scores the tokens: Router, CosineRouter, or any module [T, H] -> [T, E].
        top_k: K, that of the layer: experts per token on average.
        among: which tokens an expert picks from: all tokens of the "batch", or each "sequence" by
            itself (the last leading dimension of x), ceil(top_k S / E) of each.
        most_per_token: columns of the result, K': a token keeps at most so many of the experts that
            picked it, the best ones; the others then serve fewer tokens. None is E, so that no pick
            is lost.
        score_function: "softmax" or "sigmoid", the same as that of the layer's gate.

    Attributes:
        router: see above.

    Raises:
        TypeError: a size is not an int, or router is not a module that scores each token alone.
        ValueError: a value is out of range.
    """

    chooses = True
    top_k = Fixed[int]()
    among = Fixed[str]()
    most_per_token = Fixed[int]()
    score_function = Fixed[str]()
    default_normalize = "none"

    def __init__(
        self,
        router: nn.Module,
        top_k: int,
        *,
        among: str = "batch",
        most_per_token: int | None = None,
        score_function: str = "softmax",
    ) -> None:
        super().__init__(router)
        check_choice("ExpertChoiceRouter", "among", among, AMONG)
        check_choice("ExpertChoiceRouter", "score_function", score_function, SCORE_FUNCTIONS)
        most = self.num_experts if most_per_token is None else most_per_token
        for name, value in (("top_k", top_k), ("most_per_token", most)):
            check_among("ExpertChoiceRouter", name, value, self.num_experts)
        self.top_k = top_k
        self.among = among
        self.most_per_token = most
        self.score_function = score_function

    @property
    def looks_ahead(self) -> str:  # type: ignore[override]
        """Why it does."""
        return (
            f"lets experts pick from all tokens of a {self.among}, and whether an early one is "
            "picked depends on later ones"
        )

    def forward(
        self, x: Tensor, router_input: Tensor | None = None, token_mask: Tensor | None = None
    ) -> RouterOutput:
        """The experts that picked each token.

        Args:
            x: [..., H] in the dtype of the router's parameters; [..., S, H] with among "sequence".
            router_input: [..., G], scored instead of x if given.
            token_mask: x's leading dimensions, bool; no expert picks a token where it is False.

        Returns:
            logits [..., E], and indices [..., K'] int64, best first.
        """
        scored = x if router_input is None else router_input
        leading = scored.shape[:-1]
        length = math.prod(leading)
        if self.among == "sequence":
            if not leading:
                raise RuntimeError(
                    'ExpertChoiceRouter: x must be [..., length, hidden_size] with among "sequence"'
                    f", got shape {list(scored.shape)}"
                )
            length = leading[-1]
        given = score(self.router, scored.reshape(math.prod(leading), scored.shape[-1]))  # [T, E]
        logits, clean = given.logits, given.clean_logits
        mask = None if token_mask is None else token_mask.reshape(-1)
        indices = self._picked(logits.detach(), mask, length)
        return RouterOutput(
            logits.reshape(*leading, self.num_experts),
            indices.reshape(*leading, self.most_per_token),
            clean_logits=None if clean is None else clean.reshape(*leading, self.num_experts),
            noise_deviation=given.noise_deviation,
        )

    def _picked(self, logits: Tensor, mask: Tensor | None, length: int) -> Tensor:
        """The experts that picked each token, in groups of `length` tokens: [T, K'] int64."""
        num_tokens = logits.shape[0]
        groups = num_tokens // length if length else 0
        scores = self._scores(wide(logits))
        # Every token asks every expert, which serves the best first and only so many: those are its
        # picks. Each group has experts of its own.
        asked = torch.arange(self.num_experts, device=logits.device).expand(logits.shape)
        if mask is not None:
            asked = asked.masked_fill(~mask.unsqueeze(1), -1)
        of_group = torch.arange(groups, device=logits.device).view(groups, 1, 1)
        grouped = asked.reshape(groups, length, self.num_experts)
        own = (grouped + of_group * self.num_experts).where(grouped >= 0, -1)
        capacity = self._capacity(mask, groups, length, logits.device)
        kept = ops.limit_capacity(
            own.reshape(num_tokens, self.num_experts),
            capacity.unsqueeze(1).expand(-1, self.num_experts).reshape(-1),
            priority=scores,
        )
        picked = kept >= 0  # [T, E]
        best = ops.select_experts(scores.masked_fill(~picked, -torch.inf), self.most_per_token)
        return best.where(picked.gather(1, best), -1)

    def _scores(self, logits: Tensor) -> Tensor:
        """What tokens are picked by: [T, E], finite unless NaN.

        These are the scores; a score that underflows is replaced by its logarithm, which is below
        every score and keeps the order.
        """
        if self.score_function == "sigmoid":
            scores, logarithms = logits.sigmoid(), torch.nn.functional.logsigmoid(logits)
        else:
            scores, logarithms = logits.softmax(dim=-1), logits.log_softmax(dim=-1)
        limits = torch.finfo(scores.dtype)
        return torch.where(scores < limits.tiny, logarithms.clamp(min=limits.min), scores)

    def _capacity(
        self, mask: Tensor | None, groups: int, length: int, device: torch.device
    ) -> Tensor:
        """How many tokens an expert picks from each group: [groups] int64."""
        if mask is None:
            picks = expert_capacity(length, self.num_experts, self.top_k, 1)
            return torch.full((groups,), picks, dtype=torch.int64, device=device)
        counted = mask.view(groups, length).sum(dim=1)
        return expert_capacity(counted, self.num_experts, self.top_k, 1)

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"top_k={self.top_k}, among={self.among!r}, most_per_token={self.most_per_token}, "
            f"score_function={self.score_function!r}"
        )
