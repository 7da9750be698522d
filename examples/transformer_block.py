"""A transformer block with a mixture of experts as its feed-forward, and how to train it.

The task: numbers modulo 11, each the sum of the two before it. Attention fetches the two numbers,
the experts add them. Sequences differ in length and are padded.

Shapes: B sequences of S tokens, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from torchmoe import routing_statistics
from torchmoe.nn import Balance, Capacity, MoE, Routing

MODULUS = 11  # also the size of the vocabulary
SEQUENCES, LENGTH = 64, 16
HIDDEN, HEADS, EXPERTS, TOP_K = 64, 4, 8, 2
BLOCKS, STEPS = 2, 120
# With order "token" no later token takes an earlier one's place, as causality asks. In evaluation
# every expert has room for all tokens.
CAPACITY = Capacity(1, order="token", eval_factor=EXPERTS)
BALANCE = Balance(0.01, z_loss_weight=0.001, selection_bias_rate=0.001)
# What a token must not look at. Padding comes after all tokens, so this hides it as well.
LATER = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)  # [S, S]


class Block(nn.Module):
    """Attention, then the experts: each behind a norm, each added to the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.moe_norm = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS, bias=False, batch_first=True)
        self.moe = MoE(HIDDEN, 2 * HIDDEN, EXPERTS, TOP_K, capacity=CAPACITY, balance=BALANCE)

    def forward(self, x: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """From x [B, S, H] and token_mask [B, S] to the new x, aux_loss and routing.

        The block returns aux_loss and keeps nothing, so a checkpoint can run it a second time.
        """
        h = self.attention_norm(x)
        h, _ = self.attention(h, h, h, attn_mask=LATER, is_causal=True, need_weights=False)
        x = x + h
        output = self.moe(self.moe_norm(x), token_mask=token_mask)  # padding takes up no room
        return x + output.hidden_states, output.aux_loss, output.routing


class Model(nn.Module):
    """The blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.checkpointed = False
        self.embedding, self.position = nn.Embedding(MODULUS, HIDDEN), nn.Embedding(LENGTH, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Sequential(nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, MODULUS, bias=False))

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, list[Routing]]:
        """Tokens and mask [B, S] to logits [B, S, MODULUS], aux_loss and each block's routing."""
        x = self.embedding(tokens) + self.position.weight
        aux_loss, routings = x.new_zeros(()), []
        for block in self.blocks:
            if self.checkpointed:  # keeps the block's input alone; backward runs the block again
                x, loss, routing = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x, loss, routing = block(x, mask)
            aux_loss = aux_loss + loss
            routings.append(routing)
        return self.head(x), aux_loss, routings


def draw() -> tuple[Tensor, Tensor]:
    """Tokens [B, S], and their mask, which is True where a token counts."""
    tokens = torch.randint(MODULUS, (SEQUENCES, LENGTH))
    for t in range(2, LENGTH):
        tokens[:, t] = (tokens[:, t - 1] + tokens[:, t - 2]) % MODULUS
    return tokens, torch.arange(LENGTH) < torch.randint(LENGTH // 2, LENGTH + 1, (SEQUENCES, 1))


def task_loss(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens that follow from others: the third, and those after it."""
    targets = tokens.masked_fill(~mask, -100)[:, 2:]  # cross_entropy ignores -100
    return functional.cross_entropy(logits[:, 1:-1].flatten(0, 1), targets.flatten())


def main() -> None:
    """Trains, shows the routing, and compares gradients with and without checkpointing."""
    torch.set_num_threads(1)  # more are slower at this size
    torch.manual_seed(0)
    model = Model()
    moes = [module for module in model.modules() if isinstance(module, MoE)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(STEPS):
        tokens, mask = draw()
        logits, aux_loss, routings = model(tokens, mask)
        loss = task_loss(logits, tokens, mask)
        optimizer.zero_grad()
        (loss + aux_loss).backward()
        optimizer.step()
        # What a layer remembers, here its selection bias, moves once per optimizer step. With
        # several micro-batches in a step, update takes the list of their routings.
        for moe, routing in zip(moes, routings, strict=True):
            moe.update(routing)
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} at the start, {losses[-1]:.2f} after {STEPS} steps")
    for number, routing in enumerate(routings):
        shown = routing_statistics(routing)
        print(
            f"block {number}: tokens per expert {shown.tokens_per_expert.tolist()}, "
            f"dropped {shown.dropped_share:.1%}, MaxVio {shown.max_violation:.2f}"
        )

    tokens, mask = draw()
    gradients = []
    for model.checkpointed in (False, True):
        logits, aux_loss, _ = model(tokens, mask)
        total = task_loss(logits, tokens, mask) + aux_loss
        gradients.append(torch.autograd.grad(total, list(model.parameters())))
    equal = all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    print(f"gradients with activation checkpointing: {'the same bits' if equal else 'different'}")


if __name__ == "__main__":
    main()
