"""How a layer keeps its experts' loads even: the terms of aux_loss, and the rate of the bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor

import torchmoe.losses
from torchmoe import ops
from torchmoe._by_expert import count, shares
from torchmoe._checks import (
    check_choice,
    check_counts,
    check_flag,
    check_not_negative,
    check_output,
    shown,
)
from torchmoe._wide import wide
from torchmoe.losses import LOSSES, Loss, LossInputs
from torchmoe.nn import _reduce
from torchmoe.nn._settings import Settings
from torchmoe.ops import FRACTION_CHOICES, FRACTIONS_FROM


class Load(NamedTuple):
    """The router's choices in one forward pass, from which fractions are formed."""

    chosen: Tensor
    """[T, K] int64, -1 = not routed."""
    tokens_per_expert: Tensor
    """[E] int64, their counts."""
    num_tokens: int | Tensor
    """How many tokens count."""
    leading: torch.Size
    """The leading dimensions of the layer's input; the last one is the sequence."""
    training: bool
    """Whether the layer trains: only then are processes asked for their counts."""
    earlier_counts: Tensor | None
    """See `MoE.forward`."""
    usage: Tensor | None
    """[E], the router's, where it keeps any."""


@dataclass(frozen=True)
class _Term:
    """A weighted term; under torch.compile an attribute may change, where an entry may not."""

    name: str
    term: str | Loss
    weight: float

    def of(self, inputs: LossInputs) -> object:
        """The term itself, unweighted."""
        return (LOSSES[self.term] if isinstance(self.term, str) else self.term)(inputs)


@dataclass(frozen=True, repr=False)
class Balance(Settings):
    """The weighted terms of aux_loss, and the selection bias.

    For example:

        Balance(0.001)                                         a weaker load-balancing loss
        Balance(0)                                             none
        Balance(z_loss_weight=0.001)                           and a router z-loss (ST-MoE)
        Balance(0, selection_bias_rate=0.001)                  balance without a loss (DeepSeek-V3)
        Balance(fraction_from="history")                       the same for any micro-batches
        Balance(losses=[("local_entropy_loss", 0.01)])         a further term

    Attributes:
        weight: coefficient of load_balancing_loss in aux_loss.
        z_loss_weight: coefficient of router_z_loss in aux_loss; at 0 it is not computed.
        losses: further terms of aux_loss as (term, weight): the name of a function in
            `torchmoe.losses`, or your own function from `torchmoe.losses.LossInputs` to a scalar,
            which is listed under its __name__.
        fraction_from: where the fractions of load_balancing_loss (each expert's share of the slots)
            come from. "batch": the tokens of this call. "sequence": each sequence alone, and the
            losses are averaged (the last leading dimension of x is the sequence; DeepSeek-V3, arXiv
            2412.19437, equation 17). "global_batch": the calls of all processes (Qiu et al., arXiv
            2501.11873). In training mode forward sums them with an all-reduce that every process
            must reach, even one without tokens. Each process uses its own mean scores. With n_r
            counted tokens in this process, n in total and W processes, the process's term is
            multiplied by n_r W / n. The mean over the processes of terms and gradients is therefore
            that of one batch of all tokens, however the tokens are distributed. The other terms of
            aux_loss are means over the process's own tokens. "history": the router's `usage`. With
            "history", and with "sequence" for equal numbers of sequences, accumulating the
            gradients of micro-batches gives exactly the gradient of one batch; for the others see
            `earlier_counts` of `MoE.forward`.
        fraction_choices: "all": all choices of a token count in the fractions; "first": only the
            first (GShard, arXiv 2006.16668). "history" counts all choices.
        selection_bias_rate: if above 0, the layer has a selection bias that `MoE.update` moves by
            this much against the load, see `torchmoe.update_selection_bias`.
        selection_bias_centred: keeps the mean of the selection bias constant.

    Raises:
        TypeError: a value has another type.
        ValueError: a value is out of range or unknown, or conflicts with another.
    """

    weight: float = 0.01
    z_loss_weight: float = 0.0
    losses: Sequence[tuple[str | Loss, float]] = ()
    fraction_from: str = "batch"
    fraction_choices: str = "all"
    selection_bias_rate: float = 0.0
    selection_bias_centred: bool = False
    # Every term other than load_balancing_loss, router_z_loss included.
    _terms: tuple[_Term, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Checks every field."""
        check_choice("Balance", "fraction_from", self.fraction_from, FRACTIONS_FROM)
        check_choice("Balance", "fraction_choices", self.fraction_choices, FRACTION_CHOICES)
        check_flag("Balance", "selection_bias_centred", self.selection_bias_centred)
        if self.fraction_from == "history" and self.fraction_choices != "all":
            raise ValueError(
                'Balance: fraction_choices must be "all" with fraction_from "history", '
                f'got "{self.fraction_choices}"'
            )
        numbers = ("weight", "z_loss_weight", "selection_bias_rate")
        values = {
            name: check_not_negative("Balance", name, getattr(self, name)) for name in numbers
        }
        losses = _pairs(self.losses)
        pairs = [("router_z_loss", values["z_loss_weight"]), *losses]
        terms = tuple(
            _Term(_name(term), term, weight)
            for term, weight in pairs
            if weight > 0 or term != "router_z_loss"
        )
        _check_names([term.name for term in terms])
        for name, value in (*values.items(), ("losses", losses), ("_terms", terms)):
            object.__setattr__(self, name, value)

    def account(
        self, inputs: LossInputs, load: Load, group: _reduce.SharedGroup
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The auxiliary loss of a forward pass.

        Args:
            inputs: what the terms are formed from.
            load: what fractions are formed of.
            group: the processes of "global_batch".

        Returns:
            aux_loss, a scalar, and its unweighted terms by name.

        Raises:
            TypeError: a term does not return a tensor, or earlier_counts is not one.
            RuntimeError: a term's result, or earlier_counts, has another shape, dtype or device.
            ValueError: earlier_counts do not apply here, or have a negative element.
        """
        losses = {"load_balancing_loss": self._load_balancing_loss(inputs, load, group)}
        aux_loss = self.weight * losses["load_balancing_loss"]
        device = inputs.logits.device
        for term in self._terms:
            part = f'the term "{term.name}" of balance.losses'
            loss = check_output("MoE", part, term.of(inputs), (), "a scalar", device)
            aux_loss = aux_loss + term.weight * loss
            losses[term.name] = loss
        return aux_loss, losses

    def unknown(self, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What `account` stands for where there are no logits: 0, and NaN for each term."""
        names = ["load_balancing_loss", *(term.name for term in self._terms)]
        return logits.new_zeros(()), {name: logits.new_full((), math.nan) for name in names}

    def _shown(self, name: str) -> str:
        if name == "losses":
            return repr([(_name(term), weight) for term, weight in self.losses])
        return super()._shown(name)

    def _load_balancing_loss(
        self, inputs: LossInputs, load: Load, group: _reduce.SharedGroup
    ) -> Tensor:
        logits, mask, num_experts = inputs.logits, inputs.token_mask, inputs.num_experts
        choices, counts = load.chosen, load.tokens_per_expert
        part = None
        if self.fraction_choices == "first":
            choices = choices[:, :1]
            counts = count(choices.flatten(), num_experts)
        if load.earlier_counts is not None:
            self._check_earlier(load.earlier_counts, counts)
            counts = counts + load.earlier_counts
        if self.fraction_from == "history":
            counts = cast(Tensor, load.usage)
        elif self.fraction_from == "global_batch" and load.training:
            counts, part = _reduce.counts_and_part(
                counts, load.num_tokens, group.group, wide(logits[:0]).dtype
            )
        elif self.fraction_from == "sequence":
            length = load.leading[-1] if load.leading else 1
            sequences = math.prod(load.leading[:-1])
            logits = logits.view(sequences, length, num_experts)
            mask = None if mask is None else mask.view(sequences, length)
            counts = count(choices.reshape(sequences, length * choices.shape[1]), num_experts)
        loss = ops.load_balancing_loss(
            logits,
            shares(counts, logits.dtype),
            score_function=inputs.score_function,
            token_mask=mask,
        )
        return loss if part is None else part * loss

    def _check_earlier(self, earlier_counts: Tensor, counts: Tensor) -> None:
        if self.fraction_from not in ("batch", "global_batch"):
            raise ValueError(
                f'MoE: earlier_counts must be None with fraction_from "{self.fraction_from}", '
                f"got {shown(earlier_counts)}"
            )
        check_counts(
            "MoE", "earlier_counts", earlier_counts, counts.shape[0], counts.device, whole=True
        )


def _pairs(losses: Sequence[tuple[str | Loss, float]]) -> tuple[tuple[str | Loss, float], ...]:
    """The terms, each a known name or a function and a weight."""
    if not isinstance(losses, Sequence) or isinstance(losses, str):
        raise TypeError(
            f"Balance: losses must be pairs of a term and its weight, got {shown(losses)}"
        )
    pairs = []
    for pair in losses:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"Balance: losses must be pairs of a term and its weight, got {pair!r}")
        term, weight = pair
        if isinstance(term, str):
            check_choice("Balance", "losses", term, LOSSES)
        elif not callable(term) or not hasattr(term, "__name__"):
            raise TypeError(
                "Balance: losses must hold a name or a function with a __name__ in each pair, "
                f"got {term!r}"
            )
        elif getattr(torchmoe.losses, term.__name__, None) is term:
            raise TypeError(
                f'Balance: losses must have "{term.__name__}" for that function, which takes '
                "other arguments than a term of a layer, got the function"
            )
        pairs.append(
            (term, check_not_negative("Balance", f'the weight of "{_name(term)}"', weight))
        )
    return tuple(pairs)


def _check_names(names: Sequence[str]) -> None:
    """Raises ValueError where a term is named twice."""
    for i, name in enumerate(names):
        if name == "load_balancing_loss" or name in names[:i]:
            raise ValueError(
                "Balance: losses must name every term once, router_z_loss here or by "
                f'z_loss_weight, and load_balancing_loss by weight, got "{name}"'
            )


def _name(term: str | Loss) -> str:
    return term if isinstance(term, str) else term.__name__
