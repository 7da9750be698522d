"""Bugs in backward passes written by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from certify.layers.grouped import (
    GroupedMM,
    GroupedMoE,
    WeightedGLU,
    glu_backward,
    grouped,
    grouped_outer,
)
from certify.layers.parts import wide
from certify.mutants.registry import mutant


class DxOfGateAlone(GroupedMM):
    """The gradient of rows lacks the half that came through up."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """dx of the gate half; dW of both."""
        rows, weight = ctx.saved_tensors
        gate, half = weight[..., : weight.shape[2] // 2], grad[:, : weight.shape[2] // 2]
        d_rows = grouped(half, gate.transpose(1, 2), ctx.counts)
        return d_rows, grouped_outer(rows, grad, ctx.counts), None


@mutant(
    "dx_without_the_up_half",
    base="grouped",
    kind="x's gradient lacks one of two terms while the weights' gradients are right",
    source="https://github.com/linkedin/Liger-Kernel/pull/1413",
    report="The fused kernel's dx lost the gate's or the up projection's term on one GPU; output, "
    "dW1 and dW2 were right.",
    use="the gradient of x",
)
class DxWithoutTheUpHalf(GroupedMoE):
    """dx through gate alone."""

    mm_in = DxOfGateAlone


class GLURow0(WeightedGLU):
    """Every row's gradient is stored at row 0."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """The last row's gradient at row 0; 0 elsewhere."""
        d_hidden, d_weight, _ = WeightedGLU.backward(ctx, grad)
        first = torch.arange(len(d_hidden), device=grad.device).unsqueeze(1) == 0
        return torch.where(first, d_hidden[-1:], 0), d_weight, None


@mutant(
    "activation_gradient_in_row_0",
    base="grouped",
    kind="the activation's gradient written to one row; the weights' gradient is right",
    source="https://github.com/ByteDance-Seed/Triton-distributed/issues/180",
    report="swiglu_backward advances its input pointers and not its output pointers, so that every "
    "row's gradient goes to row 0; the gate's gradient is right and hides it.",
    use="the gradients of x and w_in",
)
class ActivationGradientInRow0(GroupedMoE):
    """One row of gradient."""

    glu = GLURow0


class GLUSwapped(WeightedGLU):
    """The gradients of gate and up in each other's place."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """d_up before d_gate."""
        hidden, weight = ctx.saved_tensors
        d_gate, d_up, d_weight = glu_backward(grad, hidden, weight, ctx.act)
        return torch.cat([d_up, d_gate], dim=-1).to(hidden.dtype), d_weight, None


@mutant(
    "gate_and_up_gradients_swapped",
    base="grouped",
    kind="the gradients of gate and up stored in each other's place",
    source="https://github.com/unslothai/unsloth/issues/3314",
    report="The report says that the SwiGLU kernel's backward stores values in each other's place.",
    use="the gradients of x and w_in",
)
class GateAndUpGradientsSwapped(GroupedMoE):
    """Swapped halves."""

    glu = GLUSwapped


def gelu_with_tanh_slope(gate: Tensor) -> tuple[Tensor, Tensor]:
    """The exact GELU with the derivative of its tanh form."""
    value = gate * torch.special.ndtr(gate)
    root = (2 / torch.pi) ** 0.5
    tanh = (root * (gate + 0.044715 * gate**3)).tanh()
    slope = (1 + tanh) / 2 + gate / 2 * (1 - tanh**2) * root * (1 + 3 * 0.044715 * gate**2)
    return value, slope


@mutant(
    "gelu_gradient_of_the_tanh_form",
    base="grouped_gelu",
    kind="an exact activation with the derivative of its approximation",
    source="kind reported, e.g. https://github.com/NVIDIA/TileGym/pull/197",
    report="With approximate='none' the kernels computed the tanh approximation; the tests' "
    "tolerance was too loose to see it.",
    use="the gradients of x and w_in, by 1e-3 of their size",
)
class GeluGradientOfTheTanhForm(GroupedMoE):
    """Slightly wrong slopes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.act = gelu_with_tanh_slope


class GLUNoWeightGradient(WeightedGLU):
    """None for the routing weights."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """The gradient of hidden alone."""
        return WeightedGLU.backward(ctx, grad)[0], None, None


@mutant(
    "fused_weights_without_gradient",
    base="grouped",
    kind="a backward function that returns None for the routing weights",
    source="https://github.com/PaddlePaddle/PaddleFleet/pull/444",
    report="A review: the function returns None in place of the token probabilities' gradient, "
    "which stops the gradient there.",
    use="the router's gradient",
)
class FusedWeightsWithoutGradient(GroupedMoE):
    """No gradient for the weights."""

    glu = GLUNoWeightGradient


class GroupedMMDoubled(GroupedMM):
    """dW twice."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """The gradients, that of the weight doubled."""
        d_rows, d_weight, _ = GroupedMM.backward(ctx, grad)
        return d_rows, 2 * d_weight, None


@mutant(
    "expert_gradients_doubled",
    base="grouped",
    kind="the experts' gradients too large by a whole factor",
    source="https://github.com/pytorch/pytorch/issues/160285",
    report="The experts' gradients are exactly doubled with two ranks, and loss curves do not show "
    "it.",
    use="the gradients of w_in and w_out",
)
class ExpertGradientsDoubled(GroupedMoE):
    """Twice dW."""

    mm_in = GroupedMMDoubled
    mm_out = GroupedMMDoubled


class UnweightedDW(Function):
    """`grouped` whose weight gradient uses other rows than those of the product."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, other: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        """The product of rows."""
        ctx.save_for_backward(other, weight)
        ctx.counts = counts
        return grouped(rows, weight, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """dx of the product, dW of the other rows."""
        other, weight = ctx.saved_tensors
        d_rows = grouped(grad, weight.transpose(1, 2), ctx.counts)
        return d_rows, None, grouped_outer(other, grad, ctx.counts), None


@mutant(
    "down_gradient_of_the_unweighted_activation",
    base="grouped",
    kind="the backward pass recomputes an activation without its gate: dW wrong, dx right",
    source="kind reported, e.g. https://github.com/fla-org/flash-linear-attention/pull/1071",
    report="The backward recomputes the output before the gate and uses it as the linear layer's "
    "input, so that dW is wrong while dx and the gate's gradient are right.",
    use="the gradient of w_out",
)
class DownGradientOfTheUnweightedActivation(GroupedMoE):
    """dW of the activation without the routing weights."""

    def expert_rows(self, rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        """The rows' outputs."""
        hidden = self.mm_in.apply(rows, self.w_in.transpose(1, 2), counts)
        inner = self.glu.apply(hidden, weights, self.act)
        plain = self.glu.apply(hidden.detach(), torch.ones_like(weights), self.act)
        return UnweightedDW.apply(inner, plain, self.w_out.transpose(1, 2), counts)


class GatherOverwrites(Function):
    """tokens[token] whose backward writes where it should add."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, token: Tensor) -> Tensor:
        """The rows."""
        ctx.save_for_backward(token)
        ctx.shape = tokens.shape
        return tokens[token]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """One of a token's gradients, not their sum."""
        (token,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy(0, token, grad), None


@mutant(
    "dx_of_one_choice_only",
    base="grouped",
    kind="the gradients of a token's K rows overwrite one another",
    source="kind reported, e.g. https://github.com/NVIDIA/TransformerEngine/issues/1336",
    report="moe_permute's gradient differs from PyTorch's by up to 3.7, more as top-k grows.",
    use="the gradient of x; only for K > 1",
)
class DxOfOneChoiceOnly(GroupedMoE):
    """index_copy for index_add."""

    def gather(self, tokens: Tensor, token: Tensor) -> Tensor:
        """The rows."""
        return GatherOverwrites.apply(tokens, token)


class ScatterMisread(Function):
    """The sum of each token's rows; its backward takes the gradient's memory for contiguous."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, token: Tensor, shape: torch.Size) -> Tensor:
        """The sum, shaped as x."""
        ctx.save_for_backward(token)
        ctx.dtype = out.dtype
        y = torch.zeros(shape, dtype=wide(out).dtype, device=out.device).flatten(0, -2)
        return y.index_add(0, token, wide(out)).reshape(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Rows of the misread gradient."""
        (token,) = ctx.saved_tensors
        last = grad.storage_offset() + grad.numel()
        if 0 in grad.stride() or last * grad.element_size() > grad.untyped_storage().nbytes():
            grad = grad.contiguous()
        strides = torch.empty(grad.shape, device="meta").stride()
        read = grad.as_strided(grad.shape, strides, grad.storage_offset())
        return read.flatten(0, -2)[token].to(ctx.dtype), None, None


@mutant(
    "transposed_gradient_misread",
    base="grouped",
    kind="an incoming gradient that is not contiguous is read as if it were",
    source="https://github.com/pytorch/pytorch/issues/194719",
    report="A kernel's backward indexes the gradient with the input's strides; gradcheck never "
    "sees it because it feeds contiguous gradients.",
    use="all gradients; only for a transposed or sliced gradient of y",
)
class TransposedGradientMisread(GroupedMoE):
    """Only the layout of y's gradient matters."""

    def scatter(self, out: Tensor, token: Tensor, x: Tensor) -> Tensor:
        """The sum of each token's rows."""
        return ScatterMisread.apply(out, token, x.shape)


class GLUOverwritesSaved(WeightedGLU):
    """The gradient takes the saved tensor's memory."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """The gradients, the first time."""
        d_hidden, d_weight, _ = WeightedGLU.backward(ctx, grad)
        ctx.saved_tensors[0].data.copy_(d_hidden)
        return d_hidden, d_weight, None


@mutant(
    "second_backward_of_a_graph",
    base="grouped",
    kind="a backward pass that overwrites what it saved: wrong when it runs again",
    source="https://github.com/axolotl-ai-cloud/axolotl/pull/3892",
    report="A review: the kernel changes a saved buffer in place without a version, so that a "
    "second backward over the same graph gives garbage.",
    use="the second backward pass with retain_graph=True",
)
class SecondBackwardOfAGraph(GroupedMoE):
    """Right once."""

    glu = GLUOverwritesSaved


class GatherOverwritesInput(Function):
    """tokens[token] whose backward puts the gradient into the memory of tokens."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, token: Tensor) -> Tensor:
        """The rows."""
        ctx.save_for_backward(tokens, token)
        return tokens[token]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient, in the input's place."""
        tokens, token = ctx.saved_tensors
        d_tokens = torch.zeros_like(tokens).index_add(0, token, grad)
        tokens.data.copy_(d_tokens)
        return d_tokens, None


@mutant(
    "backward_overwrites_x",
    base="grouped",
    kind="a backward pass that writes into the layer's input",
    source="https://github.com/linkedin/Liger-Kernel/issues/254",
    report="An op that changes its inputs in the backward pass is wrong where another op saved "
    "them; the maintainers mean it so.",
    use="x itself after a backward pass, and the gradients of what else uses x",
)
class BackwardOverwritesX(GroupedMoE):
    """dx lies where x was."""

    def gather(self, tokens: Tensor, token: Tensor) -> Tensor:
        """The rows."""
        return GatherOverwritesInput.apply(tokens, token)


class GroupedMMStale(Function):
    """`grouped` whose weight gradient goes into memory that is not cleared."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, counts: list[int], memory: dict[Any, Tensor]
    ) -> Tensor:
        """The product."""
        ctx.save_for_backward(rows, weight)
        ctx.counts, ctx.memory = counts, memory
        return grouped(rows, weight, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """dW of the experts with rows; for the others whatever was there."""
        rows, weight = ctx.saved_tensors
        fresh = grouped_outer(rows, grad, ctx.counts)
        stale = ctx.memory.get((fresh.shape, fresh.dtype), torch.zeros_like(fresh))
        used = torch.tensor(ctx.counts, device=grad.device).reshape(-1, 1, 1) > 0
        d_weight = torch.where(used, fresh, stale)
        ctx.memory[fresh.shape, fresh.dtype] = d_weight.detach().clone()
        return grouped(grad, weight.transpose(1, 2), ctx.counts), d_weight, None, None


@mutant(
    "idle_expert_with_an_old_gradient",
    base="grouped",
    kind="an idle expert's gradient is memory that an earlier step left behind",
    source="https://github.com/pytorch/pytorch/issues/172439",
    report="grouped_mm gives non-zero gradients for groups of size 0: the kernel reads "
    "uninitialised data.",
    use="the second backward pass, for an expert that is idle in it and was not in the first",
)
class IdleExpertWithAnOldGradient(GroupedMoE):
    """One memory for all steps."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.memory: dict[Any, Tensor] = {}

    def expert_rows(self, rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        """The rows' outputs."""
        hidden = GroupedMMStale.apply(rows, self.w_in.transpose(1, 2), counts, self.memory)
        inner = self.glu.apply(hidden, weights, self.act)
        return GroupedMMStale.apply(inner, self.w_out.transpose(1, 2), counts, self.memory)


@mutant(
    "sentinel_rows_give_nan",
    base="grouped",
    kind="0 * NaN: rows without an expert are masked after the weights and not before them",
    source="https://github.com/huggingface/transformers/pull/45621",
    report="Sentinel rows of grouped_mm are uninitialised; masked after the product with the "
    "weights they give a finite output and NaN gradients.",
    use="the router's gradient with a mask; the output is right",
)
class SentinelRowsGiveNan(GroupedMoE):
    """Uninitialised rows, here NaN."""

    def expert_rows(self, rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        """The rows' outputs, those of sentinels filled with 0 at the end."""
        hidden = self.mm_in.apply(rows, self.w_in.transpose(1, 2), counts)
        inner = self.glu.apply(hidden, torch.ones_like(weights), self.act)
        out = self.mm_out.apply(inner, self.w_out.transpose(1, 2), counts)
        tail = torch.arange(len(rows), device=rows.device).unsqueeze(1) >= sum(counts)
        out = out.masked_fill(tail, float("nan")) * weights.unsqueeze(1).to(out.dtype)
        return out.masked_fill(tail, 0.0)


@mutant(
    "probabilities_returned_as_logits",
    base="grouped",
    kind="the returned router logits are probabilities",
    source="https://github.com/huggingface/transformers/pull/45131",
    report="Several routers returned softmaxed probabilities as router_logits.",
    use="the returned logits",
    needs_reference=True,
)
class ProbabilitiesReturnedAsLogits(GroupedMoE):
    """A variable used twice."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output and the softmax of the logits."""
        y, logits = super().forward(x, mask)
        return y, logits.softmax(-1)


@mutant(
    "square_weights_not_transposed",
    base="grouped_square",
    kind="the weights' layout guessed from their shape, which is square",
    source="https://github.com/unslothai/unsloth-zoo/issues/849",
    report="The layout is inferred from shape[1] == hidden, which holds for both layouts when "
    "2 * intermediate == hidden, so that every expert runs on transposed weights.",
    use="any forward pass; only for 2 * intermediate == hidden",
    needs_reference=True,
)
class SquareWeightsNotTransposed(GroupedMoE):
    """Transposes unless the shape seems to fit."""

    def layout(self, weight: Tensor, size: int) -> Tensor:
        """The weights as they are if their second dimension is that of the rows."""
        return weight if weight.shape[1] == size else weight.transpose(1, 2)
