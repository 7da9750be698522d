"""Bugs in balancing losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from certify.layers.loop import AddAuxGradient, InjectedMoE, LoopMoE, StackedMoE
from certify.layers.parts import assignments
from certify.mutants.registry import mutant


@mutant(
    "aux_without_gradient",
    base="loop",
    kind="a balancing loss whose value is right and whose gradient never flows",
    source="kind reported, e.g. https://github.com/laekov/fastmoe/pull/50",
    report="The title alone: fix the gradient of the balance loss.",
    use="the auxiliary loss's gradient",
)
class AuxWithoutGradient(LoopMoE):
    """Computed under no_grad."""

    @torch.no_grad()
    def balance(
        self, logits: Tensor, chosen: Tensor, valid: Tensor, shape: Sequence[int]
    ) -> Tensor:
        """A number."""
        return super().balance(logits, chosen, valid, shape)


@mutant(
    "aux_constant_by_broadcast",
    base="loop",
    kind="shares [E] and mean scores [K] multiplied by broadcasting: blind to the routing",
    source="https://github.com/mindspore-ai/hyper-parallel/issues/752",
    report="The expert fractions [E] times the mean scores [K], summed, collapse to a value that "
    "does not show imbalance.",
    use="the auxiliary loss: equal for even and uneven use",
)
class AuxConstantByBroadcast(LoopMoE):
    """The sum over E of the shares is always 1."""

    def balance(
        self, logits: Tensor, chosen: Tensor, valid: Tensor, shape: Sequence[int]
    ) -> Tensor:
        """E * (sum of shares) * (sum of mean top scores)."""
        number = valid.sum().clamp(min=1)
        share = assignments(chosen, self.num_experts).sum(0) / (number * self.top_k)
        best = logits.softmax(-1).topk(self.top_k, dim=-1).values
        mean = (best * valid.unsqueeze(1)).sum(0) / number
        return self.num_experts * (share.unsqueeze(1) * mean.unsqueeze(0)).sum() / self.top_k


@mutant(
    "aux_of_a_double_softmax",
    base="loop",
    kind="the balancing loss takes the softmax of what are already probabilities",
    source="https://github.com/huggingface/transformers/issues/45120",
    report="The routers returned softmaxed scores as logits and the loss applied softmax again, "
    "which flattens them towards uniform.",
    use="the auxiliary loss and its gradient",
    needs_reference=True,
)
class AuxOfADoubleSoftmax(LoopMoE):
    """softmax(softmax(logits))."""

    def balance(
        self, logits: Tensor, chosen: Tensor, valid: Tensor, shape: Sequence[int]
    ) -> Tensor:
        """The loss of flattened probabilities."""
        return super().balance(logits.softmax(-1), chosen, valid, shape)


@mutant(
    "aux_counts_padding",
    base="loop",
    kind="padding tokens counted in the balancing loss",
    source="https://github.com/huggingface/transformers/issues/28505",
    report="The auxiliary loss should not include padding tokens.",
    use="the auxiliary loss with a mask",
)
class AuxCountsPadding(LoopMoE):
    """The loss routes every token for itself."""

    def balance(
        self, logits: Tensor, chosen: Tensor, valid: Tensor, shape: Sequence[int]
    ) -> Tensor:
        """The loss of all tokens."""
        chosen = logits.topk(self.top_k, dim=-1).indices
        return super().balance(logits, chosen, torch.ones_like(valid), shape)


@mutant(
    "aux_masks_the_shares_only",
    base="loop",
    kind="the mask reaches one factor of the balancing loss and not the other",
    source="kind reported, e.g. https://github.com/huggingface/transformers/pull/29363",
    report="The attention mask's part in the loss was not quite correct.",
    use="the auxiliary loss with a mask",
)
class AuxMasksTheSharesOnly(LoopMoE):
    """Mean probabilities over all tokens."""

    def balance(
        self, logits: Tensor, chosen: Tensor, valid: Tensor, shape: Sequence[int]
    ) -> Tensor:
        """Masked shares, unmasked means."""
        number = valid.sum().clamp(min=1) * self.top_k
        share = assignments(chosen, self.num_experts).sum(0) / number
        return self.num_experts * (share * logits.softmax(-1).mean(0)).sum()


@mutant(
    "aux_of_first_choices_only",
    base="loop",
    kind="the shares count each token's first choice alone",
    source="https://github.com/deepspeedai/DeepSpeed/pull/2551",
    report="For top-2 the counts and the loss use the mask of the first choice only; the "
    "maintainers call it a choice of design.",
    use="the auxiliary loss and its gradient",
    needs_reference=True,
)
class AuxOfFirstChoicesOnly(LoopMoE):
    """Second choices count nowhere."""

    def balance(
        self, logits: Tensor, chosen: Tensor, valid: Tensor, shape: Sequence[int]
    ) -> Tensor:
        """The loss of first choices, times K for its divisor."""
        return self.top_k * super().balance(logits, chosen[:, :1], valid, shape)


@mutant(
    "aux_not_divided_by_top_k",
    base="loop",
    kind="a balancing loss K times too large",
    source="https://github.com/allenai/OLMoE/issues/45",
    report="In one of two versions of the loss the shares are never divided by top_k.",
    use="the auxiliary loss",
    needs_reference=True,
)
class AuxNotDividedByTopK(LoopMoE):
    """Shares that sum to K."""

    def balance(
        self, logits: Tensor, chosen: Tensor, valid: Tensor, shape: Sequence[int]
    ) -> Tensor:
        """K times the loss."""
        return self.top_k * super().balance(logits, chosen, valid, shape)


@mutant(
    "aux_divided_by_the_processes",
    base="loop",
    kind="a balancing loss divided by the number of processes",
    source="https://github.com/NVIDIA/Megatron-LM/issues/3672",
    report="The global loss is averaged over the tokens of all ranks while its probabilities are "
    "one rank's, so that its gradient is smaller by the number of ranks.",
    use="the auxiliary loss, as if on 2 processes",
    needs_reference=True,
)
class AuxDividedByTheProcesses(LoopMoE):
    """One rank's sum over the tokens of `world_size` ranks."""

    world_size = 2

    def balance(
        self, logits: Tensor, chosen: Tensor, valid: Tensor, shape: Sequence[int]
    ) -> Tensor:
        """The loss by the number of ranks."""
        return super().balance(logits, chosen, valid, shape) / self.world_size


@mutant(
    "aux_added_twice",
    base="loop",
    kind="an auxiliary loss that joins the gradient by itself and is returned to be added as well",
    source="https://github.com/modelscope/ms-swift/issues/5375",
    report="The trainer adds the auxiliary loss to a loss that already has it.",
    use="the gradient when the caller adds the returned loss",
)
class AuxAddedTwice(LoopMoE):
    """Returned and injected."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output with the loss's gradient behind it, and the loss."""
        y, aux = super().forward(x, mask)
        return AddAuxGradient.apply(y, aux, 1.0), aux


@mutant(
    "aux_carried_over_from_evaluation",
    base="loop",
    kind="a balancing loss that includes what an earlier forward pass left behind",
    source="kind reported, e.g. https://github.com/databricks/megablocks/pull/119",
    report="Losses are saved in a list at every forward pass until the user clears it.",
    use="the first training step after an evaluation",
)
class AuxCarriedOverFromEvaluation(LoopMoE):
    """A list that only a training step empties."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.saved: list[Tensor] = []

    def balance(
        self, logits: Tensor, chosen: Tensor, valid: Tensor, shape: Sequence[int]
    ) -> Tensor:
        """The sum of what was saved."""
        loss = super().balance(logits, chosen, valid, shape)
        if not self.training:
            self.saved.append(loss.detach())
            return loss
        earlier, self.saved = self.saved, []
        return sum(earlier, loss)


@mutant(
    "aux_graph_kept_for_ever",
    base="loop",
    kind="every forward pass's graph kept alive: a leak of memory",
    source="https://github.com/databricks/megablocks/pull/119",
    report="The tensors of the balancing loss pile up, a leak of GPU memory, unless the caller "
    "clears them.",
    use="memory held after several forward passes",
)
class AuxGraphKeptForEver(LoopMoE):
    """A list that nothing empties."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.saved: list[tuple[Tensor, Tensor]] = []

    def balance(
        self, logits: Tensor, chosen: Tensor, valid: Tensor, shape: Sequence[int]
    ) -> Tensor:
        """The loss of this pass alone."""
        self.saved.append((logits, chosen))
        return super().balance(logits, chosen, valid, shape)


@mutant(
    "aux_lost_in_a_checkpoint",
    base="loop",
    kind="an auxiliary loss set as an attribute inside a reentrant checkpoint has no gradient",
    source="https://github.com/hpcaitech/ColossalAI/pull/1633",
    report="Fix that the auxiliary loss cannot go backward in modules under activation "
    "checkpointing.",
    use="the auxiliary loss's gradient in training mode",
)
class AuxLostInACheckpoint(LoopMoE):
    """The first run of a reentrant checkpoint records nothing."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output by way of a checkpoint, the loss by way of an attribute."""
        run = super().forward
        if not (self.training and torch.is_grad_enabled()):
            return run(x, mask)

        def body(x: Tensor, _: Tensor) -> Tensor:
            y, self.aux = run(x, mask)
            return y

        return checkpoint(body, x, self.router.weight, use_reentrant=True), self.aux


@mutant(
    "aux_off_unless_asked_for",
    base="loop",
    kind="a balancing loss that is silently 0 unless the caller asks for the router's logits",
    source="https://github.com/huggingface/transformers/pull/44586",
    report="output_router_logits=False, the default, kept the loss from being computed, even with "
    "a coefficient above 0.",
    use="the auxiliary loss by default",
)
class AuxOffUnlessAskedFor(LoopMoE):
    """Tied to a flag for something else."""

    output_router_logits = False

    def auxiliary(
        self, logits: Tensor, chosen: Tensor, valid: Tensor, shape: Sequence[int]
    ) -> Tensor:
        """0 by default."""
        if not self.output_router_logits:
            return logits.new_zeros(())
        return super().auxiliary(logits, chosen, valid, shape)


@mutant(
    "aux_of_one_token_squeezed",
    base="loop",
    kind="squeeze() also removes the tokens' dimension when there is one token",
    source="kind reported widely, e.g. https://github.com/omertov/encoder4editing/pull/100",
    report="For a batch of one, squeeze() removes the batch dimension too.",
    use="the auxiliary loss; only for T = 1",
)
class AuxOfOneTokenSqueezed(LoopMoE):
    """Sums one dimension too many for one token."""

    def balance(
        self, logits: Tensor, chosen: Tensor, valid: Tensor, shape: Sequence[int]
    ) -> Tensor:
        """The loss with squeezed counts."""
        number = valid.sum().clamp(min=1)
        experts = torch.arange(self.num_experts, device=chosen.device)
        onehot = (chosen.unsqueeze(-1) == experts).float().squeeze()
        share = onehot.sum(0).sum(0) / (number * self.top_k)
        mean = (logits.softmax(-1) * valid.unsqueeze(1)).sum(0) / number
        return self.num_experts * (share * mean).sum()


@mutant(
    "sequence_aux_over_the_batch",
    base="loop_sequence",
    kind="a balancing loss per sequence computed over the flattened batch",
    source="https://github.com/NVIDIA/Megatron-LM/pull/5696",
    report="Packing flattens the batch, so that the sequence-wise loss is computed over all the "
    "sequences as if they were one.",
    use="the auxiliary loss of x [B, S, H] with B > 1",
    needs_reference=True,
)
class SequenceAuxOverTheBatch(LoopMoE):
    """One group of tokens."""

    def balance(
        self, logits: Tensor, chosen: Tensor, valid: Tensor, shape: Sequence[int]
    ) -> Tensor:
        """The loss of the flattened tokens."""
        return super().balance(logits, chosen, valid, logits.shape)


@mutant(
    "z_loss_of_probabilities",
    base="loop_z",
    kind="the z-loss of probabilities instead of logits",
    source="https://github.com/huggingface/transformers/pull/48421",
    report="The router's logits were overwritten by the largest probability, which the z-loss then "
    "got.",
    use="the auxiliary loss with a z-loss",
    needs_reference=True,
)
class ZLossOfProbabilities(LoopMoE):
    """A z-loss that barely depends on the logits' size."""

    def z_loss(self, logits: Tensor, valid: Tensor) -> Tensor:
        """The z-loss of the best probability."""
        best = logits.softmax(-1).max(-1, keepdim=True).values
        return super().z_loss(best, valid)


@mutant(
    "z_loss_overflows",
    base="loop_z",
    kind="log(sum(exp(logits))) written out: infinite for large logits",
    source="https://github.com/databricks/megablocks/pull/133",
    report="A review: the log-sum-exp is numerically unstable as written.",
    use="the auxiliary loss with logits above 88 in float32",
)
class ZLossOverflows(LoopMoE):
    """No maximum is taken out."""

    def z_loss(self, logits: Tensor, valid: Tensor) -> Tensor:
        """The z-loss by exp and log."""
        return (logits.exp().sum(-1).log().square() * valid).sum() / valid.sum().clamp(min=1)


@mutant(
    "aux_of_concatenated_layers",
    base="stacked",
    kind="the balancing loss of several layers computed over their tokens as one",
    source="https://github.com/huggingface/transformers/issues/28255",
    report="Concatenating the layers' logits lets imbalance in one layer cancel that in another; "
    "the loss belongs to each layer.",
    use="the auxiliary loss of two layers",
    needs_reference=True,
)
class AuxOfConcatenatedLayers(StackedMoE):
    """Shares over all layers."""

    def auxiliary(self, routings: list[list[Tensor]], shape: Sequence[int]) -> Tensor:
        """One loss for the layers together."""
        together = [torch.cat(parts) for parts in zip(*routings, strict=True)]
        return self.layers[0].auxiliary(*together, shape)


@mutant(
    "injected_aux_discarded",
    base="injected",
    kind="the tensor that carries the auxiliary loss's gradient is thrown away",
    source="https://github.com/NVIDIA-NeMo/Automodel/issues/1408",
    report="The return value of MoEAuxLossAutoScaler.apply() is discarded, so that its backward is "
    "never called.",
    use="the router's gradient",
    needs_reference=True,
)
class InjectedAuxDiscarded(InjectedMoE):
    """apply() without its result."""

    def inject(self, y: Tensor, aux: Tensor) -> Tensor:
        """y alone."""
        super().inject(y, aux)
        return y


@mutant(
    "injected_aux_times_tokens",
    base="injected",
    kind="the auxiliary loss's gradient multiplied by the number of tokens",
    source="https://github.com/NVIDIA-NeMo/Automodel/issues/1408",
    report="The second of three bugs: a factor N for a trainer that divides by tokens, in a "
    "trainer that does not.",
    use="the router's gradient",
    needs_reference=True,
)
class InjectedAuxTimesTokens(InjectedMoE):
    """Times T."""

    def inject(self, y: Tensor, aux: Tensor) -> Tensor:
        """y with T times the gradient."""
        return super().inject(y, aux * (y.numel() // y.shape[-1]))


@mutant(
    "injected_aux_without_coefficient",
    base="injected",
    kind="the auxiliary loss's coefficient only switches it on",
    source="https://github.com/NVIDIA-NeMo/Automodel/issues/1408",
    report="The third of three bugs: the coefficient is compared with 0 and never multiplied with "
    "the loss.",
    use="the router's gradient",
    needs_reference=True,
)
class InjectedAuxWithoutCoefficient(InjectedMoE):
    """A coefficient of 1."""

    def inject(self, y: Tensor, aux: Tensor) -> Tensor:
        """y with the unweighted gradient."""
        return super().inject(y, aux / self.balance_coef) if self.balance_coef > 0 else y


@mutant(
    "injected_scale_of_the_class",
    base="injected",
    kind="the auxiliary loss's scale is the class's: one layer's setting changes every layer",
    source="kind reported, e.g. https://github.com/NVIDIA-NeMo/Automodel/pull/1412",
    report="main_loss_backward_scale, an attribute of the class, was never set by the trainer, so "
    "that the gradients had the wrong scale.",
    use="the gradient of one layer after set_loss_scale of another",
)
class InjectedScaleOfTheClass(InjectedMoE):
    """One scale for all layers."""

    shared_scale: ClassVar[float] = 1.0

    def set_loss_scale(self, scale: float) -> None:
        """Sets it for every layer."""
        type(self).shared_scale = scale

    def inject(self, y: Tensor, aux: Tensor) -> Tensor:
        """y with the class's scale."""
        return AddAuxGradient.apply(y, aux, self.shared_scale / self.micro_batches)


@mutant(
    "injected_aux_ignores_micro_batches",
    base="injected",
    kind="an auxiliary loss not divided by the number of accumulated micro-batches",
    source="https://github.com/NVIDIA-NeMo/Automodel/pull/3359",
    report="The main loss was normalised over the micro-batches and the auxiliary loss entered "
    "each of them whole.",
    use="the router's gradient with micro_batches > 1",
    needs_reference=True,
)
class InjectedAuxIgnoresMicroBatches(InjectedMoE):
    """The whole loss in each micro-batch."""

    def inject(self, y: Tensor, aux: Tensor) -> Tensor:
        """y with an undivided gradient."""
        return AddAuxGradient.apply(y, aux, self.loss_scale)
