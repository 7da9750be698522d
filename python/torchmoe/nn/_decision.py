"""The second step of `MoE.forward`: which experts, and what the full ones drop."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from torchmoe import ops
from torchmoe._checks import check_output, check_output_device, shown
from torchmoe.nn.capacity import Capacity
from torchmoe.nn.declarations import declared_by_router
from torchmoe.nn.routing import Decision, before_drop, ids_of

if TYPE_CHECKING:
    from torchmoe.nn._recall import Recalled
    from torchmoe.nn.moe import MoE
    from torchmoe.nn.routers.context_router import RouterOutput


class Choice(NamedTuple):
    """The ids of a forward pass, from the choice to the dispatch."""

    chosen: Tensor
    """[T, K]: the router's or estimator's own."""
    selected: Tensor
    """[T, K']: with assistance one more column, else the same."""
    indices: Tensor
    """[T, K']: as routed."""
    weighed: Tensor
    """[T, K']: those that weights are formed for."""
    weights: Tensor | None
    """[T, K']: of `weighed`, where they had to be known before."""
    is_kept: bool
    """Whether every chosen slot is routed as it was chosen, so that counts are the same."""


def decide(
    layer: MoE,
    routed: RouterOutput,
    token_mask: Tensor | None,
    num_tokens: int | Tensor,
    recalled: Recalled | None,
) -> Choice:
    """Selection or what a cache has recalled, assistance and capacity."""
    known = None if recalled is None else recalled.weights
    if recalled is not None and known is not None:
        chosen = recalled.ids
    else:
        chosen = select(layer, routed, token_mask)
        if recalled is not None:
            chosen = recalled.replace(chosen)
    selected = chosen if layer.assistance is None else layer.assistance(chosen)
    capacity = layer.capacity
    if capacity is None:
        return Choice(chosen, selected, selected, selected, known, layer.assistance is None)
    logits = routed.logits
    # The layer's own weights where nothing is rerouted: an estimator that draws would give other
    # ones a second time.
    weights = known
    if known is None and capacity.priority == "weight":
        weights = weigh(layer, logits, selected)
    drawn = _drawn_priority(layer, selected)
    indices = _limit(layer, logits, selected, drawn if weights is None else weights, num_tokens)
    changes = capacity.reroutes or capacity.renormalizes(layer.estimator.normalize)
    return Choice(
        chosen,
        selected,
        indices,
        _weighed(layer, selected, indices, capacity.reroutes),
        None if changes else weights,
        False,
    )


def repeat(layer: MoE, decision: Decision, logits: Tensor, token_mask: Tensor | None) -> Choice:
    """The ids of another pass, which may be one of a layer that reroutes."""
    assisted = layer.assistance is not None
    # A router that chooses may give any number, which assistance adds one to.
    is_known = assisted and not declared_by_router(layer.router).chooses
    columns = layer.top_k + 1 if is_known else None
    selected, indices = ids_of(decision, logits.shape[0], token_mask, columns)
    _draw_as_if_deciding(layer, logits, selected, token_mask)
    return Choice(
        selected[:, :-1] if assisted else selected,
        selected,
        indices,
        _weighed(layer, selected, indices, reroutes=True),
        None,
        False,
    )


def select(layer: MoE, routed: RouterOutput, token_mask: Tensor | None) -> Tensor:
    """The choice of the router where it makes one, else the estimator's."""
    if routed.indices is not None:
        mask = token_mask
        return routed.indices if mask is None else routed.indices.masked_fill(~mask[:, None], -1)
    logits = routed.logits
    chosen = layer.estimator.select(
        logits, selection_bias=layer.selection_bias, token_mask=token_mask
    )
    if not isinstance(chosen, Tensor):
        raise TypeError(f"MoE: gate.estimator.select must return a tensor, got {shown(chosen)}")
    expected = (logits.shape[0], layer.top_k)
    if chosen.dtype != torch.int64 or chosen.shape != expected:
        raise RuntimeError(
            "MoE: gate.estimator.select must return int64 [num_tokens, top_k] = "
            f"{list(expected)}, got {chosen.dtype} of shape {list(chosen.shape)}"
        )
    check_output_device("MoE", "gate.estimator.select", chosen, logits.device)
    return chosen


def weigh(layer: MoE, logits: Tensor, ids: Tensor) -> Tensor:
    """The weights of the slots.

    With constant weights a trainable router would never learn, so gate_weights refuses them if the
    logits require a gradient. The logits may require one for x alone: a frozen router loses nothing
    by a gradient of zero.
    """
    if layer.estimator.has_constant_weights(ids.shape[1]):
        learns = any(parameter.requires_grad for parameter in layer.router.parameters())
        logits = logits if learns else logits.detach()
    weights = layer.estimator.weigh(logits, ids)
    part = "gate.estimator.weigh"
    return check_output("MoE", part, weights, ids.shape, "[num_tokens, top_k]", ids.device)


def _limit(
    layer: MoE,
    logits: Tensor,
    selected: Tensor,
    priority: Tensor | None,
    num_tokens: int | Tensor,
) -> Tensor:
    """What is left of the ids where experts are full."""
    capacity, estimator = cast(Capacity, layer.capacity), layer.estimator
    slots = capacity.slots(
        num_tokens,
        layer.num_experts,
        layer.top_k,
        training=layer.training,
        usage=cast(Tensor, layer.router.usage) if capacity.dynamic else None,
    )
    scores = tie_break = None
    if capacity.reroutes:
        scores = estimator.rank(logits, selection_bias=layer.selection_bias)
        tie_break = estimator.tie_break(logits, selection_bias=layer.selection_bias)
    return ops.limit_capacity(
        selected,
        slots.expand(layer.num_experts) if isinstance(slots, Tensor) else slots,
        order=capacity.order,
        priority=None if priority is None else priority.detach(),
        overflow=capacity.overflow,
        scores=scores,
        backup=None if layer._backup is None else layer._backup.on(selected.device),
        tie_break=tie_break,
        num_experts=layer.num_experts,
    )


def _weighed(layer: MoE, selected: Tensor, indices: Tensor, reroutes: bool) -> Tensor:
    """The ids that weights are formed for.

    Before slots are dropped unless asked otherwise, which concerns the normalisation alone.
    """
    if layer.capacity is not None and layer.capacity.renormalizes(layer.estimator.normalize):
        return indices
    return before_drop(selected, indices) if reroutes else selected


def _draw_as_if_deciding(
    layer: MoE, logits: Tensor, selected: Tensor, token_mask: Tensor | None
) -> None:
    """Draws what a deciding pass draws, and discards it.

    Otherwise later draws in a recomputation would differ from those in its forward pass. A compiler
    removes draws that are not used.
    """
    if torch.compiler.is_compiling():
        return
    capacity, estimator = layer.capacity, layer.estimator
    if estimator.draws:
        estimator.select(logits, selection_bias=layer.selection_bias, token_mask=token_mask)
        if capacity is not None and capacity.reroutes and capacity.priority == "weight":
            weigh(layer, logits, selected)
    _drawn_priority(layer, selected)


def _drawn_priority(layer: MoE, selected: Tensor) -> Tensor | None:
    """A draw for every slot, in training, where the capacity has such a priority."""
    capacity = layer.capacity
    if capacity is None or capacity.priority != "random" or not layer.training:
        return None
    return torch.rand(selected.shape, device=selected.device)
