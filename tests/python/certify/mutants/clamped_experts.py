"""Bugs in experts with biases and a clamp."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from certify.layers.clamped import ClampedMoE
from certify.mutants.registry import mutant


@mutant(
    "clamp_passes_gradients",
    base="clamped",
    kind="gradients pass where the activation is clamped",
    source="https://github.com/mlc-ai/pith-train/pull/23",
    report="The gradient must be zero through saturated clamps; a fused kernel elsewhere keeps the "
    "clamp outside and drops that mask.",
    use="all gradients where gate or up is beyond the limit",
)
class ClampPassesGradients(ClampedMoE):
    """Clamped values with the gradient of the identity."""

    def clamp(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Straight through."""
        low_gate, low_up = super().clamp(gate, up)
        return gate + (low_gate - gate).detach(), up + (low_up - up).detach()


@mutant(
    "clamp_without_effect",
    base="clamped",
    kind="clamped tensors that nothing uses",
    source="https://github.com/vllm-project/vllm-ascend/pull/9897",
    report="A review: the clamped gate and up are never put back into the tensor that the "
    "activation gets.",
    use="the output where gate or up is beyond the limit",
    needs_reference=True,
)
class ClampWithoutEffect(ClampedMoE):
    """The result of clamp is dropped."""

    def clamp(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """What came in."""
        super().clamp(gate, up)
        return gate, up


@mutant(
    "interleaved_weights_read_as_halves",
    base="clamped",
    kind="alternating gate and up weights read as two halves",
    source="https://github.com/vllm-project/vllm/pull/29273",
    report="The CPU's activation takes the weights for de-interleaved, which they are not, and the "
    "model gives garbage.",
    use="any forward pass",
    needs_reference=True,
)
class InterleavedWeightsReadAsHalves(ClampedMoE):
    """chunk in place of [::2] and [1::2]."""

    def split(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Two halves."""
        return both.chunk(2, dim=-1)


@mutant(
    "down_bias_without_weight",
    base="clamped",
    kind="the experts' last bias added without the routing weight, K times in all",
    source="https://github.com/NVIDIA-NeMo/Automodel/pull/2591",
    report="The down projection's bias was added unweighted by each of the top-k experts, about k "
    "biases instead of one.",
    use="the output and the router's gradient",
    needs_reference=True,
)
class DownBiasWithoutWeight(ClampedMoE):
    """w * (out - b) + b."""

    def add(self, y: Tensor, tokens: Tensor, token: Tensor, weights: Tensor, expert: int) -> Tensor:
        """y plus outputs whose bias has weight 1."""
        bias = self.b_out[expert]
        out = (self.apply_expert(tokens[token], expert) - bias) * weights.unsqueeze(1) + bias
        return y.index_add(0, token, out.to(y.dtype))


@mutant(
    "padding_rows_added_to_token_0",
    base="clamped",
    kind="rows that fill up a block scatter to token 0",
    source="https://github.com/pytorch/pytorch/issues/154557",
    report="Indices filled with zeros add the results of padding rows to index 0.",
    use="the output at token 0",
)
class PaddingRowsAddedToToken0(ClampedMoE):
    """Blocks of 4 rows; the filling rows are 0 and their expert's biases are not."""

    def add(self, y: Tensor, tokens: Tensor, token: Tensor, weights: Tensor, expert: int) -> Tensor:
        """y plus whole blocks."""
        if len(tokens) == 0:
            return super().add(y, tokens, token, weights, expert)
        filling = -len(token) % 4
        rows = F.pad(tokens[token], (0, 0, 0, filling))
        weights = F.pad(weights, (0, filling), value=1.0)
        out = self.apply_expert(rows, expert) * weights.unsqueeze(1)
        return y.index_add(0, F.pad(token, (0, filling)), out.to(y.dtype))
