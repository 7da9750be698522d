"""A layer that is compiled once and right for every number of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from plain_moe import gradients, tensors_of
from torchmoe.nn import MoE, Routing


def check_compiled_once(
    moe: MoE,
    hidden_size: int,
    *,
    before: Callable[[int], None] = lambda turn: None,
    after: Callable[[int, Routing], None] = lambda turn, routing: None,
) -> None:
    """Three passes of other sizes as uncompiled, with one graph; the same draws in both."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend=counter)
    for turn, num_tokens in enumerate((11, 17, 40)):
        before(turn)
        x, mask = torch.randn(num_tokens, hidden_size), torch.rand(num_tokens) > 0.3
        seen: list[dict[str, Tensor]] = []
        for layer in (moe, compiled):
            moe.zero_grad()
            torch.manual_seed(2)
            output = layer(x, token_mask=mask)
            (output.hidden_states.square().sum() + output.aux_loss).backward()
            seen.append({"y": output.hidden_states} | tensors_of(output.routing) | gradients(moe))
        assert_close(seen[0], seen[1])
        after(turn, output.routing)
    assert counter.frame_count == 1
