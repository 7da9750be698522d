"""What a layer returns: values, never state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from torchmoe._checks import shown


class Decision(NamedTuple):
    """The ids of a forward pass, which another pass can be made to use."""

    selected: Tensor
    """[T, K] int64: ids before capacity."""
    indices: Tensor
    """[T, K] int64: ids as routed."""


class Routing(NamedTuple):
    """What the layer decided and how it accounts for it; T counts the flattened tokens.

    With assistance there are K + 1 columns instead of K, the last one for the slots that it adds.
    `logits`, `weights` and `losses` are part of the graph, not detached, so you can form your own
    losses from them.
    """

    logits: Tensor
    """[T, E], float32 or wider; meaningless where token_mask is False."""
    weights: Tensor
    """[T, K], float32 or wider; the weight of a slot that was dropped is ignored."""
    selected: Tensor
    """[T, K] int64: ids as selected, before capacity; -1 for masked tokens."""
    indices: Tensor
    """[T, K] int64: ids as routed; -1 also for dropped slots, another id for rerouted ones."""
    token_mask: Tensor | None
    """[T] bool, True = the token counts; None if all do."""
    tokens_per_expert: Tensor
    """[E] int64: the router's own choices, before dropping, rerouting and assistance."""
    kept_per_expert: Tensor
    """[E] int64: slots per expert after dropping, rerouting and assistance."""
    losses: dict[str, Tensor]
    """The unweighted terms of aux_loss by name.

    "load_balancing_loss" is always there, "router_z_loss" if z_loss_weight is above 0, and the
    terms of the balance's `losses`. With fraction_from "global_batch", in training, the first is
    this process's share: its mean over the processes is the loss of all tokens.
    """
    statistics: Any
    """What the estimator's combine returned next to the output, or None."""
    details: dict[str, Tensor]
    """What the router returned next to the logits, such as pooling weights; part of the graph."""

    @property
    def decision(self) -> Decision:
        """The argument `decision` of `MoE.forward` that routes another pass in the same way."""
        return Decision(self.selected, self.indices)


class MoEOutput(NamedTuple):
    """The result of a layer: a tuple, which cannot be used in place of a tensor."""

    hidden_states: Tensor
    """The shape of the layer's input and its dtype (under autocast, the autocast dtype)."""
    aux_loss: Tensor
    """Weighted sum of the losses: a scalar, float32 or wider, ready to add to the task loss."""
    routing: Routing
    """Decisions, counts and unweighted losses."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: object = None,
    ) -> NoReturn:
        """Raises an error with advice if the output is passed to a torch function."""
        raise _not_a_tensor(f"an argument of {func.__name__}")

    def __add__(self, other: object) -> tuple[Any, ...]:
        """Joins tuples as usual; for any other operand raises an error with advice."""
        if isinstance(other, tuple):
            return (*self, *other)
        raise _not_a_tensor("a summand")

    def __radd__(self, other: object) -> tuple[Any, ...]:
        """As `__add__`."""
        if isinstance(other, tuple):
            return (*other, *self)
        raise _not_a_tensor("a summand")

    def __getattr__(self, name: str) -> NoReturn:
        """Raises an error with advice if a tensor's attribute is accessed."""
        if hasattr(Tensor, name):
            raise AttributeError(f"MoE: the owner of .{name} must be a tensor, {_GOT}")
        raise AttributeError(f"'MoEOutput' object has no attribute '{name}'")


def _not_a_tensor(role: str) -> TypeError:
    return TypeError(f"MoE: {role} must be a tensor, {_GOT}")


def _refusal(role: str) -> Callable[..., NoReturn]:
    def refuse(*_operands: object) -> NoReturn:
        raise _not_a_tensor(role)

    return refuse


#: What to do if a layer's output is used in place of a tensor.
ADVICE = "take its hidden_states, or let WithAttachedLoss(moe) return them alone"

_GOT = f"got the layer's MoEOutput; {ADVICE}"

# Operators of a tensor, which a tuple lacks or, as a product, has with another meaning.
_ROLES = {
    "__mul__": "a factor",
    "__rmul__": "a factor",
    "__matmul__": "a factor",
    "__rmatmul__": "a factor",
    "__truediv__": "a dividend",
    "__rtruediv__": "a divisor",
    "__sub__": "a minuend",
    "__rsub__": "a subtrahend",
    "__neg__": "an operand",
}
for _operator, _role in _ROLES.items():
    setattr(MoEOutput, _operator, _refusal(_role))


def routings_of(routing: Routing | Sequence[Routing]) -> list[Routing]:
    """One or several, as `MoE.update` takes them."""
    example = "such as moe(x).routing, or a list of them"
    if not isinstance(routing, Routing | Iterable):
        raise TypeError(f"MoE: routing must be a Routing, {example}, got {shown(routing)}")
    routings = [routing] if isinstance(routing, Routing) else list(routing)
    for item in routings:
        if not isinstance(item, Routing):
            raise TypeError(f"MoE: routing must be a Routing, {example}, got {type(item).__name__}")
    if not routings:
        raise ValueError("MoE: routing must hold at least one Routing, got an empty list")
    return routings


def before_drop(selected: Tensor, indices: Tensor) -> Tensor:
    """The ids that weights are formed for: rerouted ones replaced, dropped ones not yet removed."""
    return indices.where(indices >= 0, selected)


def ids_of(
    decision: Decision, num_tokens: int, token_mask: Tensor | None, columns: int | None
) -> tuple[Tensor, Tensor]:
    """The ids of another pass, none for masked tokens; columns None allows any number of them."""
    pair = isinstance(decision, tuple) and len(decision) == 2
    if not pair or not all(isinstance(ids, Tensor) for ids in decision):
        raise TypeError(
            "MoE: decision must be a Decision, such as moe(x).routing.decision, "
            f"got {type(decision).__name__}"
        )
    selected, indices = decision
    expected: int | str = "top_k"
    if columns is not None:
        expected = columns
    elif selected.dim() == 2:
        expected = selected.shape[1]
    for name, ids in (("selected", selected), ("indices", indices)):
        if ids.dtype != torch.int64 or ids.shape != (num_tokens, expected):
            raise RuntimeError(
                f"MoE: decision.{name} must be int64 of shape [num_tokens, "
                f"{'top_k + 1 with assistance' if columns else 'top_k'}] = "
                f"[{num_tokens}, {expected}], got {ids.dtype} of shape {list(ids.shape)}"
            )
    if token_mask is None:
        return selected, indices
    counted = token_mask.unsqueeze(1)
    return selected.where(counted, -1), indices.where(counted, -1)
