"""An encoder over bytes whose feed-forward is a mixture of experts, and which names a class.

Shapes: B texts, S positions (CLS and bytes), H hidden size, N heads, D head size, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from studies.classification.texts import CLS, LONGEST, Texts
from torchmoe.nn import MoE, Routing
from train_lm import Attention
from training.routers import READS_TOKEN_IDS, Make, is_pooled, pooled
from training.routers import ROUTERS as LM_ROUTERS
from training.settings import HEAD_SIZE

BLOCKS, HIDDEN_SIZE, INTERMEDIATE_SIZE, EXPERTS, TOP_K = 2, 32, 64, 8, 2

# Those that read a pooled sequence come last.
ROUTERS: Mapping[str, Make] = {
    **{name: LM_ROUTERS[name] for name in sorted(LM_ROUTERS, key=is_pooled)},
    "sequence_given": pooled("given"),
}


class Scores(NamedTuple):
    """What one forward pass gives."""

    logits: Tensor  # [B, C]
    aux_loss: Tensor  # scalar, summed over the blocks, ready to add to the task loss
    routings: list[Routing]  # one per block


class Block(nn.Module):
    """Attention to the whole text, then experts, each added to the residual stream."""

    def __init__(self, router: str, layer: int) -> None:
        """Makes the two halves and their norms."""
        super().__init__()
        self.attention_norm = nn.RMSNorm(HIDDEN_SIZE)
        self.attention = Attention(HIDDEN_SIZE, 1 + LONGEST)
        self.feed_forward_norm = nn.RMSNorm(HIDDEN_SIZE)
        with torch.random.fork_rng(devices=[]):  # all else starts the same with every router
            made = ROUTERS[router](HIDDEN_SIZE, EXPERTS, TOP_K, layer)
        self.moe = MoE(HIDDEN_SIZE, INTERMEDIATE_SIZE, EXPERTS, TOP_K, router=made)
        self.routes_by_id = router in READS_TOKEN_IDS
        self.routes_by_attention = router == "sequence_given"

    def forward(self, x: Tensor, texts: Texts) -> tuple[Tensor, Tensor, Routing]:
        """Gives the new residual stream [B, S, H], the experts' loss and their routing."""
        seen = self.attention_norm(x)
        x = x + self.attention(seen, texts.token_mask)
        router_input = texts.tokens if self.routes_by_id else None
        if self.routes_by_attention:
            router_input = attention_of_cls(self.attention, seen, texts.token_mask)
        output = self.moe(
            self.feed_forward_norm(x), token_mask=texts.token_mask, router_input=router_input
        )
        return x + output.hidden_states, output.aux_loss, output.routing


def attention_of_cls(attention: Attention, x: Tensor, token_mask: Tensor) -> Tensor:
    """How much CLS looks at each position, the mean over the heads: [B, S], adds up to 1.

    Args:
        attention: a block's own.
        x: what it gets, [B, S, H].
        token_mask: bool [B, S].
    """
    batch, length, _ = x.shape
    qkv = attention.qkv(x).view(batch, length, 3, attention.heads, HEAD_SIZE)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # [B, N, S, D] each
    q, k = attention.rotate(q)[:, :, :1], attention.rotate(k)
    scores = (q @ k.transpose(2, 3)).squeeze(2) / HEAD_SIZE**0.5  # [B, N, S]
    weights: Tensor = scores.masked_fill(~token_mask[:, None], -torch.inf).softmax(dim=-1)
    return weights.mean(dim=1)


class Classifier(nn.Module):
    """Names the class of a text.

    It reads the class from the mean over CLS and the bytes: from CLS alone, whatever the experts of
    the last block do for the bytes would not count. CLS is there for the routers, yet in every
    model, so that nothing but the router differs.
    """

    def __init__(self, router: str, classes: int) -> None:
        """Makes the layers and draws their parameters from torch's default generator."""
        super().__init__()
        self.embedding = nn.Embedding(CLS + 1, HIDDEN_SIZE)
        self.head = nn.Linear(HIDDEN_SIZE, classes, bias=False)
        nn.init.zeros_(self.head.weight)  # starts with even odds
        self.norm = nn.RMSNorm(HIDDEN_SIZE)
        self.blocks = nn.ModuleList(Block(router, layer) for layer in range(BLOCKS))

    def forward(self, texts: Texts) -> Scores:
        """Scores every class."""
        x = self.embedding(texts.tokens)  # [B, S, H]
        losses, routings = [], []
        for block in self.blocks:
            x, loss, routing = block(x, texts)
            losses.append(loss)
            routings.append(routing)
        counted = texts.token_mask.unsqueeze(2)
        mean = self.norm(x).where(counted, 0).sum(dim=1) / counted.sum(dim=1)  # [B, H]
        return Scores(self.head(mean), torch.stack(losses).sum(), routings)

    def update(self, routings: list[Routing]) -> None:
        """Lets each layer move what it remembers, once per optimizer step."""
        for block, routing in zip(self.blocks, routings, strict=True):
            assert isinstance(block, Block)
            block.moe.update(routing)
