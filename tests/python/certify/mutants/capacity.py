"""Bugs in dropping."""

from __future__ import annotations

import torch
from torch import Tensor

from certify.layers.dispatch import DispatchMoE
from certify.layers.parts import wide
from certify.mutants.registry import mutant


@mutant(
    "dropped_tokens_keep_their_input",
    base="dispatch_top1",
    kind="a dropped token's output is its input times its weight instead of 0",
    source="https://github.com/huggingface/transformers/issues/37017",
    report="The results start as a copy of the hidden states, so that a dropped token gives its "
    "input times the probability of an expert that never saw it.",
    use="the output at dropped tokens, and the router's gradient",
)
class DroppedTokensKeepTheirInput(DispatchMoE):
    """The identity for dropped tokens."""

    def dropped(self, y: Tensor, tokens: Tensor, weights: Tensor, dispatch: Tensor) -> Tensor:
        """y, or w * x."""
        lost = dispatch.sum((0, 2, 3)) == 0
        return y + wide(tokens) * weights[:, :1] * lost.unsqueeze(1)


@mutant(
    "capacity_never_binds",
    base="dispatch_top1",
    kind="positions counted over a dimension of size 1: no token is ever dropped",
    source="https://github.com/huggingface/transformers/issues/48293",
    report="cumsum over a singleton dimension gives every token priority 1, so that none is "
    "dropped.",
    use="the output when an expert is over its capacity",
    needs_reference=True,
)
class CapacityNeverBinds(DispatchMoE):
    """cumsum over the wrong dimension."""

    def places(
        self, onehot: Tensor, valid: Tensor, logits: Tensor, probabilities: Tensor, capacity: int
    ) -> tuple[Tensor, Tensor, int]:
        """Every choice kept."""
        assigned = onehot & valid.unsqueeze(-1)
        priority = assigned.long().cumsum(0)  # of the choices, of which there is one
        position, _, _ = super().places(onehot, valid, logits, probabilities, capacity)
        return position, assigned & (priority <= max(capacity, 1)), max(len(valid), 1)


@mutant(
    "third_choices_share_slots",
    base="dispatch_top3",
    kind="the third choices' slots begin after the second choices only, on top of others'",
    source="https://github.com/lucidrains/st-moe-pytorch/issues/13",
    report="The count of earlier choices was replaced and not added up, a bug for top-n with "
    "n > 2.",
    use="any forward pass; only for K > 2",
)
class ThirdChoicesShareSlots(DispatchMoE):
    """The count of the choice before, not of all before."""

    def places(
        self, onehot: Tensor, valid: Tensor, logits: Tensor, probabilities: Tensor, capacity: int
    ) -> tuple[Tensor, Tensor, int]:
        """Positions with a wrong start."""
        assigned = onehot & valid.unsqueeze(-1)
        counts = assigned.sum(1, keepdim=True)
        start = torch.cat([torch.zeros_like(counts[:1]), counts[:-1]])
        position = assigned.long().cumsum(1) - 1 + start
        return position, assigned & (position < capacity), capacity


@mutant(
    "tokens_dropped_by_logits",
    base="dispatch_probs",
    kind="tokens ranked by logits filled up with 0: an expert's own tokens lose to strangers",
    source="https://github.com/deepspeedai/DeepSpeed/pull/7986",
    report="The tokens of an expert were ranked by logits, where the zeros of tokens not assigned "
    "outrank negative logits, so that far too many tokens were dropped.",
    use="the output when an expert is over its capacity and logits are negative",
    needs_reference=True,
)
class TokensDroppedByLogits(DispatchMoE):
    """0 for tokens of other experts."""

    def drop_key(self, assigned: Tensor, logits: Tensor, probabilities: Tensor) -> Tensor:
        """Logits, or 0."""
        return logits.masked_fill(~assigned, 0.0)


@mutant(
    "padding_takes_capacity",
    base="dispatch",
    kind="tokens that the mask leaves out take slots from real ones",
    source="https://github.com/NVIDIA/Megatron-LM/pull/5542",
    report="Masking padding in the losses alone lets it take expert capacity.",
    use="the output at real tokens with a mask",
)
class PaddingTakesCapacity(DispatchMoE):
    """Positions count every token."""

    def places(
        self, onehot: Tensor, valid: Tensor, logits: Tensor, probabilities: Tensor, capacity: int
    ) -> tuple[Tensor, Tensor, int]:
        """Positions of all tokens."""
        everyone = torch.ones_like(valid)
        position, kept, slots = super().places(onehot, everyone, logits, probabilities, capacity)
        return position, kept & valid.unsqueeze(-1), slots
