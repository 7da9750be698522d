"""Bugs in idle experts, sentinels and types."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from certify.layers.loop import LoopMoE
from certify.layers.parts import wide
from certify.mutants.registry import mutant


@mutant(
    "idle_expert_skipped",
    base="loop",
    kind="an expert without tokens is skipped: its gradient is None and other processes hang",
    source="https://github.com/deepspeedai/DeepSpeed/issues/5066",
    report="Experts that see no token get no gradient, and the other processes get stuck.",
    use="the gradients of an idle expert",
)
class IdleExpertSkipped(LoopMoE):
    """`continue` for an idle expert."""

    def combine(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Used experts only."""
        y = torch.zeros_like(wide(tokens))
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            if token.numel() == 0:
                continue
            out = expert(tokens[token]) * weights[token, slot].unsqueeze(1)
            y = y.index_add(0, token, out.to(y.dtype))
        return y


@mutant(
    "idle_expert_with_a_made_up_gradient",
    base="loop",
    kind="an expert without tokens is trained on some token so that its gradient exists",
    source="https://github.com/deepspeedai/DeepSpeed/issues/5066",
    report="A workaround that was passed around: feed a fake gradient to experts that see no "
    "token, by running them on the first token.",
    use="the gradients of an idle expert and of x",
)
class IdleExpertWithAMadeUpGradient(LoopMoE):
    """Token 0 through each idle expert, with a value of 0 and a gradient."""

    def combine(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The sum, plus 0 with a gradient."""
        y = super().combine(tokens, weights, chosen)
        for number, expert in enumerate(self.experts):
            if self.training and len(tokens) > 0 and not (chosen == number).any():
                out = expert(tokens[:1])
                y = y + (out - out.detach()).to(y.dtype)
        return y


def gathered(experts: nn.ModuleList, tokens: Tensor, index: Tensor) -> Tensor:
    """The output of expert index[t, k] for token t, [T, K, hidden], by gathered weights."""
    gate, up, down = (
        torch.stack([getattr(expert, name).weight for expert in experts])[index]
        for name in ("gate", "up", "down")
    )
    column = tokens.reshape(len(tokens), 1, -1, 1)
    return (down @ (F.silu(gate @ column) * (up @ column))).squeeze(-1)


@mutant(
    "sentinel_slots_reach_the_router",
    base="loop_rank",
    kind="slots of experts held elsewhere have weight 0 in the output and a gradient all the same",
    source="https://github.com/huggingface/transformers/issues/48687",
    report="Sentinel slots keep a non-zero expert output; the zero weight hides that in the "
    "forward pass and not in the backward pass, so that the router's gradient is wrong.",
    use="the router's gradient where a rank does not hold all experts",
)
class SentinelSlotsReachTheRouter(LoopMoE):
    """Sentinels are clamped to the last expert and their weights zeroed behind autograd's back."""

    def combine(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """All slots through some expert."""
        local = chosen - self.first
        sentinel = (local < 0) | (local >= len(self.experts))
        weights = weights.clone()
        weights.data[sentinel] = 0
        out = gathered(self.experts, tokens, local.clamp(0, len(self.experts) - 1))
        return wide(out * weights.unsqueeze(-1)).sum(1)


@mutant(
    "minus_one_is_the_last_expert",
    base="loop",
    kind="the sentinel -1 indexes the last expert",
    source="https://github.com/sgl-project/sglang/pull/40498",
    report="Padded rows have expert -1, and indexing a table with it gave the table's last entry.",
    use="the output at tokens that the mask leaves out, and its gradient",
)
class MinusOneIsTheLastExpert(LoopMoE):
    """A negative index into the experts' weights."""

    def combine(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """All slots, -1 too."""
        out = gathered(self.experts, tokens, chosen)
        return wide(out * weights.unsqueeze(-1)).sum(1)


@mutant(
    "global_ids_taken_as_local",
    base="loop_rank",
    kind="a global expert number compared with a rank's own numbers",
    source="kind reported, e.g. https://github.com/vllm-project/vllm-gaudi/pull/1796",
    report="A fix that translates global expert ids to local ones under expert parallelism; a "
    "review doubts that the bug was there.",
    use="the output of a rank that does not hold expert 0",
    needs_reference=True,
)
class GlobalIdsTakenAsLocal(LoopMoE):
    """Expert 0 of the rank serves expert 0 of all."""

    def combine(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The first held expert taken for expert 0."""
        chosen = torch.where(chosen < len(self.experts), chosen, -1)
        return super().combine(tokens, weights, torch.where(chosen < 0, -1, chosen + self.first))


@mutant(
    "output_in_float32",
    base="loop",
    kind="a float32 result from a bfloat16 layer",
    source="https://github.com/kyegomez/OpenMythos/pull/26",
    report="Tensors made without a dtype raise bfloat16 activations to float32, which the next "
    "linear layer refuses.",
    use="the output's dtype; only in bfloat16",
)
class OutputInFloat32(LoopMoE):
    """The accumulator itself is returned."""

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """The output without a cast."""
        return y.reshape(x.shape)


@mutant(
    "sums_in_another_order_each_time",
    base="loop_top3",
    kind="outputs added in an order that changes from call to call",
    source="https://github.com/unslothai/unsloth-zoo/pull/1258",
    report="The combine's index_add_ with atomics was not reproducible.",
    use="two equal calls; the last bits, only for K > 2",
)
class SumsInAnotherOrderEachTime(LoopMoE):
    """Begins with another expert at each call, as atomics might."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls = 0

    def combine(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The sum in a rotated order."""
        self.calls += 1
        y = torch.zeros_like(wide(tokens))
        for turn in range(len(self.experts)):
            number = (turn + self.calls) % len(self.experts)
            token, slot = torch.where(chosen == number)
            out = self.experts[number](tokens[token]) * weights[token, slot].unsqueeze(1)
            y = y.index_add(0, token, out.to(y.dtype))
        return y


@mutant(
    "expanded_index_read_as_contiguous",
    base="loop",
    kind="scatter_add reads an expanded index as if its memory were full",
    source="https://github.com/flagos-ai/FlagGems/issues/6448",
    report="scatter_add_ ignored the zero stride of an expanded index and read it as contiguous.",
    use="any forward pass",
)
class ExpandedIndexReadAsContiguous(LoopMoE):
    """The index of element (i, j) is read from place i * hidden + j of the memory."""

    def combine(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The sum at wrong places."""
        y = torch.zeros_like(wide(tokens))
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            out = expert(tokens[token]) * weights[token, slot].unsqueeze(1)
            place = torch.arange(out.numel(), device=out.device) % max(len(token), 1)
            y = y.scatter_add(0, token[place].reshape(out.shape), out.to(y.dtype))
        return y


@mutant(
    "rows_collide_when_compiled",
    base="loop",
    kind="a result that is wrong under torch.compile and right without it",
    source="kind reported, e.g. https://github.com/pytorch/pytorch/issues/183986",
    report="Under torch.compile index_add on an expanded tensor silently writes all rows into the "
    "same memory; eager mode is right.",
    use="the output under torch.compile",
)
class RowsCollideWhenCompiled(LoopMoE):
    """Imitates the compiler's fault: each row of the sum is the sum of all."""

    def combine(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The sum, in eager mode."""
        y = super().combine(tokens, weights, chosen)
        if torch.compiler.is_compiling():
            y = y.sum(0, keepdim=True).expand_as(y)
        return y
