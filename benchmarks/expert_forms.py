"""What do other forms of the experts cost: their orientation, activation, types, sorted rows?

Run it as `python -m benchmarks.expert_forms`. The experts' op runs forward and backward, without a
router, in the forms that models have them in: the fastest of the rounds in which all forms take
turns, next to that of plain SwiGLU with [E, out, in] matrices. `copied` is what an orientation
costs where it has to be changed at every step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.clock import Run, interleave
from benchmarks.contenders import Shape
from benchmarks.gating import memory
from benchmarks.variants import Variant, run
from torchmoe import ops

ROUNDS = 15
ROWS = "[E, out, in]"

Weights = tuple[Tensor, Tensor]
Form = Callable[[Tensor, Tensor, Tensor, Weights], Tensor]


def plain(x: Tensor, indices: Tensor, weights: Tensor, experts: Weights) -> Tensor:
    """SwiGLU with [E, out, in] matrices."""
    w_in, w_out = experts
    return ops.expert_mlp(x, indices, weights, w_in, None, w_out, None, "swiglu")


def shaped(**settings: float | bool) -> Form:
    """The same with settings of the activation."""

    def form(x: Tensor, indices: Tensor, weights: Tensor, experts: Weights) -> Tensor:
        w_in, w_out = experts
        return ops.expert_mlp(x, indices, weights, w_in, None, w_out, None, "swiglu", **settings)  # type: ignore[arg-type]

    return form


def transposed(**settings: float | bool) -> Form:
    """With [E, in, out] matrices, read where they lie."""

    def form(x: Tensor, indices: Tensor, weights: Tensor, experts: Weights) -> Tensor:
        w_in, w_out = (w.mT for w in experts)
        return shaped(**settings)(x, indices, weights, (w_in, w_out))

    return form


def copied(x: Tensor, indices: Tensor, weights: Tensor, experts: Weights) -> Tensor:
    """With [E, in, out] matrices, copied first."""
    w_in, w_out = (w.mT.contiguous() for w in experts)
    return plain(x, indices, weights, (w_in, w_out))


def sorted_rows(x: Tensor, indices: Tensor, weights: Tensor, experts: Weights) -> Tensor:
    """By way of grouped_mlp: the rows are gathered before it and added up after it."""
    w_in, w_out = experts
    plan = ops.dispatch_plan(indices, len(w_in))
    rows = ops.permute(x, plan)
    out = ops.grouped_mlp(rows, w_in, None, w_out, None, plan.expert_offsets, "swiglu")
    return ops.unpermute(out, weights, plan)


def weighted_input(x: Tensor, indices: Tensor, weights: Tensor, experts: Weights) -> Tensor:
    """Weights applied to what the experts read, as in Llama 4."""
    w_in, w_out = experts
    plan = ops.dispatch_plan(indices, len(w_in))
    rows = ops.permute(x, plan) * weights.reshape(-1)[plan.row_to_slot].unsqueeze(1)
    out = ops.grouped_mlp(rows, w_in, None, w_out, None, plan.expert_offsets, "swiglu")
    return ops.unpermute(out, torch.ones_like(weights), plan)


GPT_OSS = {"alpha": 1.702, "limit": 7.0, "up_offset": 1.0}
FORMS: dict[str, tuple[Form, bool]] = {  # and whether its matrices lie as [E, in, out]
    ROWS: (plain, False),
    "[E, in, out]": (transposed(), True),
    "[E, in, out], copied": (copied, True),
    "interleaved": (shaped(interleaved=True), False),
    "clamped, alpha": (shaped(**GPT_OSS), False),
    "gpt-oss": (transposed(interleaved=True, **GPT_OSS), True),
    "softcaps": (shaped(gate_softcap=4.0, up_softcap=25.0), False),
    "sorted rows": (sorted_rows, False),
    "weights on the input": (weighted_input, False),
}


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints a table for each shape and type."""
    for dtype in (torch.float32, torch.bfloat16):
        print(f"\n{str(dtype).removeprefix('torch.')}")
        run(
            "python -m benchmarks.expert_forms",
            "Times the experts' op, forward + backward, in the forms that models have.",
            lambda shape, dtype=dtype: measure(shape, dtype),  # type: ignore[misc]
            arguments,
        )
    return 0


def measure(shape: Shape, dtype: torch.dtype) -> list[Variant]:
    """Every form on the same tokens, and tokens of float32 where the experts have 16 bits."""
    torch.manual_seed(0)
    x = torch.randn(shape.tokens, shape.hidden)
    indices = torch.rand(shape.tokens, shape.experts).topk(shape.top_k).indices
    weights = torch.rand(shape.tokens, shape.top_k).requires_grad_()
    w_in = torch.randn(shape.experts, 2 * shape.intermediate, shape.hidden) * shape.hidden**-0.5
    w_out = torch.randn(shape.experts, shape.hidden, shape.intermediate) * shape.intermediate**-0.5
    given = w_in.to(dtype), w_out.to(dtype)
    runs: dict[str, Run] = {}

    def step(form: Form, x: Tensor, grad: Tensor, experts: Weights) -> float:
        leaves = x.detach().requires_grad_(), *(w.detach().requires_grad_() for w in experts)
        begin = time.perf_counter()
        y = form(leaves[0], indices, weights, (leaves[1], leaves[2]))
        torch.autograd.grad(y, (*leaves, weights), grad)
        return time.perf_counter() - begin

    def add(name: str, form: Form, of_tokens: torch.dtype, experts: Weights) -> None:
        tokens = x.to(of_tokens)
        grad = torch.randn_like(tokens)
        runs[name] = lambda: step(form, tokens, grad, experts)

    for name, (form, is_transposed) in FORMS.items():
        stored = [w.mT.contiguous() if is_transposed else w for w in given]
        add(name, form, dtype, (stored[0], stored[1]))
    if dtype != torch.float32:
        add("float32 tokens", plain, torch.float32, given)
    for once in runs.values():  # what a first call sets up
        once()
    times = interleave(runs, ROUNDS)
    return [
        Variant(name, times[name].low, shape.flops, memory(once)) for name, once in runs.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
