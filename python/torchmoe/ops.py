"""The ops as typed functions: `torchmoe.ops.NAME` is `torch.ops.torchmoe.NAME`, documented.

Shapes: T tokens, H hidden size, I intermediate size, E experts, K experts per token, N = T * K
rows. Floating tensors are float32, float64, bfloat16 or float16 with any strides. Everything runs
under torch.compile(fullgraph=True), gives the same bits for any number of threads, and returns
shapes that do not depend on data. Derivatives exist to any order, in reverse and in forward mode,
and through torch.func's transforms. Wrong shapes and dtypes raise RuntimeError and values out of
range ValueError, always as `op: argument must requirement, got actual`.

An id outside [0, E) means "not routed": the slot has no output, its weight is ignored, and its
gradient is exactly 0. The ops write -1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from torchmoe._checks import (
    check_at_least,
    check_finite,
    check_flag,
    check_integer,
    check_number,
    check_positive,
    check_tensor,
    shown,
)

_ops = torch.ops.torchmoe


def _words(argument: str) -> tuple[str, ...]:
    return tuple(_ops._vocabulary(argument)[0])


_Function = TypeVar("_Function", bound=Callable[..., object])


def _listing_words(function: _Function) -> _Function:
    """Replaces a line `{argument}` of the docstring by the library's list of words for it."""

    def listed(line: re.Match[str]) -> str:
        words = zip(*_ops._vocabulary(line["argument"]), strict=True)
        return "\n".join(f"{line['indent']}* `{name}`: {doc}" for name, doc in words)

    lines = r"^(?P<indent> *)\{(?P<argument>[a-z_ ]+)\}$"
    function.__doc__ = function.__doc__ and re.sub(lines, listed, function.__doc__, flags=re.M)
    return function


#: The words that arguments take, as the library lists them.
SCORE_FUNCTIONS = _words("score_function")
NORMALIZES = _words("normalize")
ORDERS = _words("order")
OVERFLOWS = _words("overflow")
ROUNDINGS = _words("rounding")
ACTIVATIONS = _words("activation")
PRIORITIES = _words("priority")
FRACTIONS_FROM = _words("fraction_from")
FRACTION_CHOICES = _words("fraction_choices")
EVICTIONS = _words("eviction")
PLAIN_ACTIVATIONS = _words("plain activation")
GATED_ACTIVATIONS = _words("gated activation")


class DispatchPlan(NamedTuple):
    """Where each slot goes, sorted by expert; slot t * K + j is token t's j-th choice."""

    expert_offsets: Tensor
    """[E + 1] int64: expert e owns rows expert_offsets[e] up to expert_offsets[e + 1]."""
    row_to_slot: Tensor
    """[N] int64: routed slots by expert, in slot order within one, then the unrouted ones."""
    slot_to_row: Tensor
    """[T, K] int64: the inverse of row_to_slot."""


class CacheTable(NamedTuple):
    """The keys of a cache's entries."""

    keys: Tensor
    """[M, G] float32, or float64 for float64 rows."""
    signatures: Tensor
    """[M, L] int64, of `cache_signatures`; -1 in the first column: the entry is free."""


class CacheInsertion(NamedTuple):
    """What `cache_insert` has decided."""

    row: Tensor
    """[M] int64: the row that has become the entry, the last one if there were several; else -1."""
    last_used: Tensor
    """[M] int64."""
    uses: Tensor
    """[M] int64."""


def _call(op: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (whatever the op takes)
    """Calls the op; where torch's error does not name the argument, adds its name."""
    try:
        return op(*args, **kwargs)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if (explained := _explain(op, args, kwargs)) is None:
            raise
        raise explained from error


def _explain(
    op: Any,  # noqa: ANN401 (torch's own)
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> Exception | None:
    """An error that names the argument torch refused, or None if it refused none of them."""
    schema = op._schema
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    for argument in schema.arguments:
        if argument.name not in given:
            continue
        value = given[argument.name]
        kind = str(argument.type)
        if kind.startswith("Optional[") and value is None:
            continue
        fits, requirement = _FITS[kind.removeprefix("Optional[").removesuffix("]")]
        if not isinstance(value, fits) or (isinstance(value, bool) and bool not in fits):
            or_none = " or None" if kind.startswith("Optional[") else ""
            return TypeError(
                f"{_name(op)}: {argument.name} must be {requirement}{or_none}, got {shown(value)}"
            )
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return ValueError(f"{_name(op)}: {argument.name} must fit 64 bits, got {value}")
        if type(value).__name__ == "DTensor":
            return TypeError(
                f"{_name(op)}: {argument.name} must be a tensor of this process alone, such as "
                f"{argument.name}.to_local() or {argument.name}.full_tensor(), got a DTensor"
            )
    return None


def _name(op: Any) -> str:  # noqa: ANN401 (torch's own)
    """What the op is called here."""
    return str(op._schema.name).partition("::")[2]


# The types that a schema knows, in words.
_FITS: dict[str, tuple[tuple[type, ...], str]] = {
    "Tensor": ((Tensor,), "a tensor"),
    "str": ((str,), "a string"),
    "int": ((int, torch.SymInt), "an int"),
    "SymInt": ((int, torch.SymInt), "an int"),
    "float": ((int, float, torch.SymFloat), "a number"),
    "bool": ((bool,), "True or False"),
}


def _parts(op: str, plan: DispatchPlan) -> DispatchPlan:
    """The plan; raises TypeError if it is something else, such as the tensor it belongs to."""
    if not isinstance(plan, tuple) or len(plan) != len(DispatchPlan._fields):
        raise TypeError(f"{op}: plan must be a DispatchPlan, got {shown(plan)}")
    return plan


def _entries(op: str, table: CacheTable) -> CacheTable:
    """The table; raises TypeError if it is something else, such as its keys."""
    if not isinstance(table, tuple) or len(table) != len(CacheTable._fields):
        raise TypeError(f"{op}: table must be a CacheTable, got {shown(table)}")
    return table


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The router's linear map x weight^T + bias, accumulated in float32 whatever the input type.

    Differentiable in all three. Under autocast it stays in float32: Switch Transformer
    (arXiv 2101.03961, section 2.4) shows that a router in bfloat16 diverges.

    Args:
        x: [T, H] floating.
        weight: [E, H], the dtype of x.
        bias: [E], the dtype of x.

    Returns:
        logits [T, E], float32 (float64 for float64 input).

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
    """
    return cast(Tensor, _call(_ops.router_logits.default, x, weight, bias))


def select_experts(
    scores: Tensor,
    top_k: int,
    *,
    selection_bias: Tensor | None = None,
    token_mask: Tensor | None = None,
    tie_break: Tensor | None = None,
) -> Tensor:
    """The top_k experts of each token, best first (Shazeer et al., arXiv 1701.06538).

    Ties go to the larger tie_break, then to the lower expert id. NaN ranks last, after -inf. An
    expert may be chosen even at -inf, so every token gets top_k ids. Not differentiable.

    Args:
        scores: [T, E] floating: what the experts are ranked by.
        top_k: K, in [1, E].
        selection_bias: [E] floating, added to the scores for ranking only (Wang et al., arXiv
            2408.15664).
        token_mask: [T] bool, True = the token counts; the others get -1 in every slot.
        tie_break: [T, E] floating: decides between experts whose scores, with the bias, are equal.
            Probabilities that have underflowed, or that a bias has absorbed, can be equal where the
            logits they were formed from differ.

    Returns:
        indices [T, K] int64.

    Raises:
        ValueError: top_k is out of range.
        RuntimeError: a shape, dtype or device does not fit.
    """
    check_integer("select_experts", "top_k", top_k)
    return cast(
        Tensor,
        _call(
            _ops.select_experts.default,
            scores,
            top_k,
            selection_bias=selection_bias,
            token_mask=token_mask,
            tie_break=tie_break,
        ),
    )


def limit_capacity(
    indices: Tensor,
    capacity: Tensor | int,
    *,
    order: str = "choice",
    priority: Tensor | None = None,
    overflow: str = "drop",
    scores: Tensor | None = None,
    backup: Tensor | None = None,
    tie_break: Tensor | None = None,
    num_experts: int | None = None,
) -> Tensor:
    """Drops or reroutes the slots that exceed an expert's capacity.

    Serves the slots one after another; an expert keeps the first `capacity` slots that it gets. A
    slot whose expert is full overflows: it is given to another expert at once, before the next slot
    is served, or becomes -1. Not differentiable. `torchmoe.expert_capacity` computes the usual
    capacity, `torchmoe.dynamic_capacity` one that follows the history of the load.

    For a given capacity, only the order of service decides whether a later token can change what
    happens to an earlier one, that is, whether the routing is not causal:

    - order "token" without a priority: never, with any overflow
    - order "choice" with more than one choice, or a priority: it can

    The time grows linearly with the number of slots (with a priority, like the time of a sort). A
    rerouted slot also looks through the experts that still have room.

    Args:
        indices: [T, K] int64. Ids outside [0, E) take no room and come out as -1.
        capacity: [E] int64, each >= 0; or one int >= 0 for all experts, along with num_experts.
        order: "choice": every token's first choice in token order, then all second choices, and so
            on (GShard, arXiv 2006.16668; ST-MoE, arXiv 2202.08906). "token": token by token, first
            choice before second; the only order in which a token's fate never depends on later
            tokens, so the only causal one.
        priority: [T, K] floating, replaces the order: larger first over all slots, NaN last, equal
            ones by `order` (V-MoE, arXiv 2106.05974).
        overflow: "drop": the slot is dropped. "next_best": it goes to the token's best other expert
            with room, by scores; ties go to the larger tie_break, then to the lower id, and NaN
            ranks last. An expert that any other slot of the token names, served or not, is passed
            over. If no expert is left the slot is dropped. "backup": it goes to backup[e] of its
            expert e if that has room and no other slot of the token names it; otherwise as in
            "next_best".
        scores: [T, E] floating, for overflow "next_best" and "backup" only.
        backup: [E] int64, for overflow "backup" only: another expert for each expert.
        tie_break: [T, E] floating, with scores only: decides between equal scores, see
            `select_experts`.
        num_experts: E; required when capacity is an int, and must equal its size when it is a
            tensor.

    Returns:
        indices [T, K] int64.

    Raises:
        TypeError: capacity is neither an int nor a tensor.
        ValueError: an unknown order or overflow, a negative num_experts or int capacity, an int
            capacity without num_experts, scores or backup without their overflow, or missing with
            it. On the CPU only, since another device would have to be waited for: a negative entry
            of capacity, or an entry of backup that is no expert or the expert it belongs to.
        RuntimeError: a shape, dtype or device does not fit.
    """
    if num_experts is not None:
        check_at_least("limit_capacity", "num_experts", num_experts, 0)
    if isinstance(capacity, Tensor):
        if num_experts is not None and capacity.shape != (num_experts,):
            raise RuntimeError(
                f"limit_capacity: capacity must be [num_experts] = [{num_experts}], "
                f"got shape {list(capacity.shape)}"
            )
    else:
        if not isinstance(capacity, int | torch.SymInt) or isinstance(capacity, bool):
            raise TypeError(
                f"limit_capacity: capacity must be an int or tensor, got {shown(capacity)}"
            )
        if num_experts is None:
            raise ValueError(
                "limit_capacity: num_experts must be given when capacity is an int, got None"
            )
        check_at_least("limit_capacity", "capacity", capacity, 0)
        check_tensor("limit_capacity", "indices", indices)
        capacity = torch.full((num_experts,), capacity, dtype=torch.int64, device=indices.device)
    return cast(
        Tensor,
        _call(
            _ops.limit_capacity.default,
            indices,
            capacity,
            order=order,
            priority=priority,
            overflow=overflow,
            scores=scores,
            backup=backup,
            tie_break=tie_break,
        ),
    )


def gate_weights(
    logits: Tensor, indices: Tensor, *, score_function: str, normalize: str, estimator: str
) -> Tensor:
    """The combine weight of each slot, given the choice of experts.

    With p = score_function(logits) over all E experts and i_j the expert of slot j:

    - normalize "none": w_j = p[t, i_j] (Switch Transformer, arXiv 2101.03961)
    - normalize "topk": w_j = p[t, i_j] / sum of p over the token's routed slots (Shazeer et al.,
      arXiv 1701.06538: softmax over the chosen logits gives the same value), formed from logarithms
      where p underflows; where every logit is -inf the weights are 0
    - normalize "uniform": w_j = 1 / number of the token's routed slots

    Differentiable in logits. An estimator replaces the derivative at every order and in both modes.

    Args:
        logits: [T, E] floating.
        indices: [T, K] int64. A slot whose id lies outside [0, E) gets weight 0.
        score_function: "softmax" or "sigmoid" (DeepSeek-V3, arXiv 2412.19437).
        normalize: "none", "topk" or "uniform".
        estimator: "exact": the derivative of the formula. "straight_through": selection and
            normalisation count as the identity (Bengio et al., arXiv 1308.3432), so dL/dp_i is the
            sum of the gradients at the slots of expert i, and 0 for experts that the token did not
            choose.

    Returns:
        weights [T, K], float32 (float64 for float64 logits).

    Raises:
        ValueError: an unknown name; or a gradient is required but the "exact" one is zero
            everywhere (normalize "uniform", or "topk" with K = 1), so the router could never learn.
        RuntimeError: a shape, dtype or device does not fit.
    """
    return cast(
        Tensor,
        _call(
            _ops.gate_weights.default,
            logits,
            indices,
            score_function=score_function,
            normalize=normalize,
            estimator=estimator,
        ),
    )


def dispatch_plan(indices: Tensor, num_experts: int) -> DispatchPlan:
    """The stable counting sort of the slots by expert: a full permutation, whatever the ids.

    Slots per expert are `plan.expert_offsets.diff()`. Not differentiable.

    Args:
        indices: [T, K] int64.
        num_experts: E >= 0.

    Returns:
        The plan. Slots with an id outside [0, E) are in the rows from expert_offsets[E] on.

    Raises:
        ValueError: num_experts is negative.
        RuntimeError: a shape, dtype or device does not fit.
    """
    check_integer("dispatch_plan", "num_experts", num_experts)
    return DispatchPlan(*_call(_ops.dispatch_plan.default, indices, num_experts))


def permute(x: Tensor, plan: DispatchPlan) -> Tensor:
    """Copies each token to the rows of its experts, sorted by expert.

    Rows of unrouted slots are zero. Differentiable in x.

    Args:
        x: [T, H] floating.
        plan: from dispatch_plan.

    Returns:
        rows [N, H] in the dtype of x.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
    """
    return cast(Tensor, _call(_ops.permute.default, x, *_parts("permute", plan)))


def unpermute(rows: Tensor, weights: Tensor, plan: DispatchPlan) -> Tensor:
    """Returns the rows to their tokens: the weighted sum of each token's rows.

    y[t] = sum over routed slots j of weights[t, j] * rows[slot_to_row[t, j]].

    Differentiable in rows and weights. Accumulates in float32 or wider. The weights of
    unrouted slots are ignored.

    Args:
        rows: [N, H] floating.
        weights: [T, K], float32 or wider, or the dtype of rows.
        plan: from dispatch_plan.

    Returns:
        y [T, H] in the dtype of rows.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
    """
    return cast(Tensor, _call(_ops.unpermute.default, rows, weights, *_parts("unpermute", plan)))


def grouped_linear(
    rows: Tensor, weight: Tensor, bias: Tensor | None, expert_offsets: Tensor
) -> Tensor:
    """One linear map per expert, over its own rows.

    rows[a:b] weight[e]^T + bias[e] with a, b = expert_offsets[e], expert_offsets[e + 1].

    Rows from expert_offsets[E] on come out zero. Differentiable in rows, weight and bias;
    an expert without rows gets a gradient of zeros. Under autocast all three are cast to the
    autocast type.

    Args:
        rows: [N, H] floating, sorted by expert.
        weight: [E, O, H], the dtype of rows.
        bias: [E, O], the dtype of rows, or None.
        expert_offsets: [E + 1] int64, from dispatch_plan.

    Returns:
        [N, O] in the dtype of rows.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
    """
    return cast(Tensor, _call(_ops.grouped_linear.default, rows, weight, bias, expert_offsets))


def sum_by_expert(rows: Tensor, expert_offsets: Tensor) -> Tensor:
    """The sum of each expert's rows, added in row order.

    sums[e] = sum of rows[r] for expert_offsets[e] <= r < expert_offsets[e + 1].

    Rows from expert_offsets[E] on are not read; an expert without rows has 0. Sums are formed in
    float32 (float64 for float64 rows) and rounded once. Differentiable in rows.

    Args:
        rows: [N, H] floating, sorted by expert.
        expert_offsets: [E + 1] int64, from dispatch_plan.

    Returns:
        [E, H] in the dtype of rows.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
    """
    return cast(Tensor, _call(_ops.sum_by_expert.default, rows, expert_offsets))


def _shaped(
    op: str,
    alpha: float,
    limit: float | None,
    up_offset: float,
    gate_softcap: float | None,
    up_softcap: float | None,
    interleaved: bool,
) -> dict[str, object]:
    """What a gated activation does besides f(gate) * up, checked."""
    bounds = {"limit": limit, "gate_softcap": gate_softcap, "up_softcap": up_softcap}
    return {
        "alpha": check_positive(op, "alpha", alpha),
        "up_offset": check_finite(op, "up_offset", up_offset),
        "interleaved": check_flag(op, "interleaved", interleaved),
        **{
            name: None if bound is None else check_positive(op, name, bound)
            for name, bound in bounds.items()
        },
    }


@_listing_words
def expert_mlp(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    *,
    alpha: float = 1,
    limit: float | None = None,
    up_offset: float = 0,
    gate_softcap: float | None = None,
    up_softcap: float | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Gather, W_in, activation, W_out and the weighted sum in one op.

    y[t] = sum over routed slots j of weights[t, j] * expert_{indices[t, j]}(x[t]).

    The activations are plain, f(up):

    {plain activation}

    or gated, f(gate) * up (Shazeer, arXiv 2002.05202):

    {gated activation}

    With f(u) = u * s(u), a gated one may be shaped further:

        a = softcap(g, gate_softcap) * s(alpha * g) * (softcap(v, up_softcap) + up_offset)
        g = min(gate, limit),  v = up within [-limit, limit],  softcap(x, c) = c * tanh(x / c)

    gpt-oss (arXiv 2508.10925) has swiglu with alpha=1.702, limit=7, up_offset=1 and
    interleaved=True. The gradient at a bound is that inside of it, as torch.clamp's is.

    w_in and w_out are read where they lie if their rows or their columns are contiguous: pass
    w.transpose(1, 2) for matrices stored as [E, in, out]. Their gradients lie in memory as they do.

    The experts compute in the dtype of their parameters. x of another dtype is converted to it;
    y and the gradient of x are rounded once, from their sums to the dtype of x.

    Differentiable in x, weights and the four parameters. The backward pass keeps x, the
    pre-activation, the weights and integers, nothing of size [N, H]. Tangents and derivatives of
    higher order are formed by permute, grouped_linear and unpermute, which keep arrays of N rows.
    Under autocast x and the four parameters are cast to the autocast type.

    When a gradient is required, a policy for selective activation checkpointing does not see this
    op but dispatch_plan and then torch.ops.torchmoe._expert_mlp.default, which keeps y and the
    pre-activation. It sees every other op under its own name.

    Args:
        x: [T, H] floating.
        indices: [T, K] int64.
        weights: [T, K], float32, float64 or the dtype of x.
        w_in: [E, I, H] floating; for gated activations [E, 2 * I, H], the gates' rows first. The
            parameters that follow have its dtype.
        b_in: [E, I] or [E, 2 * I], or None.
        w_out: [E, H, I].
        b_out: [E, H], or None.
        activation: a name from above.
        alpha: above 0; what follows is of gated activations alone.
        limit: above 0, or None for no limit.
        up_offset: added to the value.
        gate_softcap: above 0, or None for no softcap.
        up_softcap: above 0, or None for no softcap.
        interleaved: whether gates and values alternate among the rows of w_in and b_in, a gate
            first, instead of the gates coming first.

    Returns:
        y [T, H] in the dtype of x; 0 for a token without a routed slot.

    Raises:
        ValueError: an unknown activation, or a setting out of its range or of a plain activation.
        RuntimeError: a shape, dtype or device does not fit.
    """
    shaped = _shaped("expert_mlp", alpha, limit, up_offset, gate_softcap, up_softcap, interleaved)
    parameters = (w_in, b_in, w_out, b_out)
    return cast(
        Tensor,
        _call(_ops.expert_mlp.default, x, indices, weights, *parameters, activation, **shaped),
    )


def grouped_mlp(
    rows: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    expert_offsets: Tensor,
    activation: str,
    *,
    alpha: float = 1,
    limit: float | None = None,
    up_offset: float = 0,
    gate_softcap: float | None = None,
    up_softcap: float | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Each expert's network on its own rows, which are sorted by expert already.

    out[r] = w_out[e] activation(w_in[e] rows[r] + b_in[e]) + b_out[e] for
    expert_offsets[e] <= r < expert_offsets[e + 1]: `expert_mlp` without dispatch, weights and
    combine. Rows from expert_offsets[E] on come out zero. Derivatives, dtypes, the orientation of
    the matrices and autocast are as there.

    Args:
        rows: [N, H] floating.
        w_in: as in `expert_mlp`, as are the parameters that follow.
        b_in: [E, I] or [E, 2 * I], or None.
        w_out: [E, H, I].
        b_out: [E, H], or None.
        expert_offsets: [E + 1] int64, ascending from 0 to at most N.
        activation: a name from `expert_mlp`, as are the settings that follow.
        alpha: above 0.
        limit: above 0, or None for no limit.
        up_offset: added to the value.
        gate_softcap: above 0, or None for no softcap.
        up_softcap: above 0, or None for no softcap.
        interleaved: whether gates and values alternate.

    Returns:
        [N, H] in the dtype of rows.

    Raises:
        ValueError: an unknown activation, or a setting out of its range or of a plain activation.
        RuntimeError: a shape, dtype or device does not fit.
    """
    shaped = _shaped("grouped_mlp", alpha, limit, up_offset, gate_softcap, up_softcap, interleaved)
    parameters = (w_in, b_in, w_out, b_out)
    return cast(
        Tensor,
        _call(_ops.grouped_mlp.default, rows, *parameters, expert_offsets, activation, **shaped),
    )


def load_balancing_loss(
    logits: Tensor,
    fraction: Tensor,
    *,
    score_function: str,
    token_mask: Tensor | None = None,
) -> Tensor:
    """How unevenly the experts are used: E * sum_i fraction_i * P_i.

    P_i is the mean over counted tokens of expert i's share of the scores.

    Switch Transformer (arXiv 2101.03961, section 2.2) with GShard's differentiable P (arXiv
    2006.16668). Exactly 1 when either factor is uniform. The gradient flows through P only.
    The coefficient belongs to the caller.

    Args:
        logits: [..., T, E] floating; leading dimensions are independent and the losses are averaged
            over those that have a counted token.
        fraction: [..., E]: each expert's share of the slots. Gets no gradient.
        score_function: "softmax" or "sigmoid"; the scores are divided by their sum over the
            experts, formed from logarithms where they underflow.
        token_mask: [..., T] bool, True = the token counts.

    Returns:
        A scalar, float32 (float64 for float64 logits). 0 when no token counts.

    Raises:
        ValueError: an unknown score function.
        RuntimeError: a shape, dtype or device does not fit.
    """
    return cast(
        Tensor,
        _call(
            _ops.load_balancing_loss.default,
            logits,
            fraction,
            score_function=score_function,
            token_mask=token_mask,
        ),
    )


def mean_over_tokens(values: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """The mean over counted tokens, with the same bits for any number of threads.

    torch's own mean divides the tokens among the threads, so its bits depend on their number.
    `torchmoe.losses` and `torchmoe.routing_statistics` are built on this op.

    Args:
        values: [..., T, C] floating; leading dimensions are independent. Values of tokens that do
            not count are ignored, NaN included.
        token_mask: [..., T] bool, True = the token counts.

    Returns:
        [..., C], float32 (float64 for float64 values), summed in float64; 0 where no token counts.
        Differentiable in values.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
    """
    return cast(Tensor, _call(_ops.mean_over_tokens.default, values, token_mask=token_mask))


def router_z_loss(logits: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """The mean over counted tokens of logsumexp(logits)^2, which keeps logits small.

    ST-MoE (arXiv 2202.08906), section 3.3. Differentiable in logits.

    Args:
        logits: [..., E] floating.
        token_mask: logits' shape without the last dimension, bool, True = the token counts.

    Returns:
        A scalar, float32 (float64 for float64 logits). 0 when no token counts.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
    """
    return cast(Tensor, _call(_ops.router_z_loss.default, logits, token_mask=token_mask))


def scale_gradient(x: Tensor, scale: Tensor) -> Tensor:
    """A copy of x whose gradient is multiplied by `scale` in the backward pass.

    Args:
        x: floating, any shape.
        scale: floating, broadcastable to x's shape. Gets no gradient.

    Returns:
        x's values, in a new tensor.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
    """
    return cast(Tensor, _call(_ops.scale_gradient.default, x, scale))


def attach_dense_gradient(
    y: Tensor,
    probs: Tensor,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    *,
    alpha: float = 1,
    limit: float | None = None,
    up_offset: float = 0,
    gate_softcap: float | None = None,
    up_softcap: float | None = None,
    interleaved: bool = False,
) -> Tensor:
    """A copy of y whose backward pass gives probs the gradient of the dense mixture.

    dL/dprobs[t, i] = <dL/dy[t], E_i(x[t])> for every expert i, chosen or not, with E_i the experts
    of `expert_mlp`.

    The effect is that of adding sum_i (probs_i - constant) E_i(x), whose value is 0, to y, but no
    expert is computed in the forward pass. The backward pass is DenseMixer's
    (https://openreview.net/forum?id=4HGIIekCx3). x and the experts' weights get no gradient here.
    The backward pass takes 2 T E H (P + I) FLOPs, P being the width of w_in, in blocks of tokens.

    Differentiable in y and probs; the gradient of probs is differentiable in everything that it is
    computed from. Under autocast x and the four parameters are cast to the autocast type.

    Args:
        y: [T, H] floating.
        probs: [T, E] floating.
        x: [T, H] floating.
        w_in: as in `expert_mlp`, as are the arguments that follow.
        b_in: [E, I] or [E, 2 * I], or None.
        w_out: [E, H, I].
        b_out: [E, H], or None.
        activation: a name from `expert_mlp`, as are the settings that follow.
        alpha: above 0.
        limit: above 0, or None for no limit.
        up_offset: added to the value.
        gate_softcap: above 0, or None for no softcap.
        up_softcap: above 0, or None for no softcap.
        interleaved: whether gates and values alternate.

    Returns:
        y's values, in a new tensor.

    Raises:
        ValueError: an unknown activation, or a setting out of its range or of a plain activation.
        RuntimeError: a shape, dtype or device does not fit.
    """
    op = "attach_dense_gradient"
    shaped = _shaped(op, alpha, limit, up_offset, gate_softcap, up_softcap, interleaved)
    parameters = (w_in, b_in, w_out, b_out)
    return cast(
        Tensor,
        _call(_ops.attach_dense_gradient.default, y, probs, x, *parameters, activation, **shaped),
    )


# The default is an integer because torch.compile(dynamic=True) traces a float one as symbolic.
def attach_loss(x: Tensor, loss: Tensor, scale: float = 1) -> Tensor:
    """A copy of x that carries `loss` in its graph.

    When the gradient of x is computed, the loss receives the gradient `scale`, whatever gradient
    arrives at x. A model whose layers pass on a single tensor can therefore train with an auxiliary
    loss, whatever is done with x later. If the task loss is scaled for mixed precision, or divided
    for gradient accumulation, `scale` must be the same factor.

    Every backward pass through the copy gives the loss its gradient, including a pass through the
    graph of a gradient. That is right for an objective with a penalty on its gradient. For a
    Hessian-vector product, whose objective is a gradient alone, add the loss instead.

    Args:
        x: floating, any shape.
        loss: floating scalar. One with a forward-mode tangent is refused.
        scale: the gradient that the loss receives, a finite number.

    Returns:
        x's values, in a new tensor.

    Raises:
        TypeError: scale is not a number.
        ValueError: scale is not finite; a symbolic one is not checked.
        RuntimeError: a shape or dtype does not fit.
    """
    if torch.compiler.is_compiling():
        check_number("attach_loss", "scale", scale)
    else:
        check_finite("attach_loss", "scale", scale)
    return cast(Tensor, _call(_ops.attach_loss.default, x, loss, scale))


def cache_signatures(x: Tensor, planes: Tensor, *, row_mask: Tensor | None = None) -> Tensor:
    """On which side of random hyperplanes each row lies, as one number for each table.

    signatures[r, l] = sum over b of 2^b [<planes[l, b], x[r]> >= 0].

    For two rows at an angle a, one bit is the same with probability 1 - a / pi, if the planes are
    drawn from a normal distribution (Charikar 2002, "Similarity estimation techniques from rounding
    algorithms", https://doi.org/10.1145/509907.509965). On the CPU only; not differentiable.

    Args:
        x: [R, G] floating.
        planes: [L, B, G] floating, B in [1, 62].
        row_mask: [R] bool, True = the row counts.

    Returns:
        [R, L] int64. -1 for a row that does not count, or whose length is 0, not a number or
        outside [1e-75, 1e75].

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
    """
    return cast(Tensor, _call(_ops.cache_signatures.default, x, planes, row_mask))


def cache_lookup(
    x: Tensor, signatures: Tensor, table: CacheTable, order: Tensor, similarity: float
) -> Tensor:
    """The entry whose key is nearest to each row, among those that are similar to it.

    A row x and a key k are similar if <x, k> / (|x| |k|) >= similarity and similarity <= |x| / |k|
    <= 1 / similarity, in float64. Only entries that share a signature with the row are compared, so
    that a similar one may be missed, but a row finds a key that is equal to it. Of equally near
    ones the lowest is taken. On the CPU only; not differentiable.

    Args:
        x: [R, G] floating.
        signatures: [R, L] int64, of `cache_signatures`; a row with -1 in the first column finds
            nothing.
        table: the entries.
        order: [L, M] int64, the entries of each table by signature:
            `table.signatures.t().sort(stable=True).indices`.
        similarity: in (0, 1].

    Returns:
        [R] int64; -1 = none.

    Raises:
        TypeError: table is not a CacheTable.
        ValueError: similarity is out of range.
        RuntimeError: a shape, dtype or device does not fit.
    """
    keys, of_keys = _entries("cache_lookup", table)
    check_number("cache_lookup", "similarity", similarity)
    op = _ops.cache_lookup.default
    return cast(Tensor, _call(op, x, signatures, keys, of_keys, order, similarity))


@_listing_words
def cache_insert(
    x: Tensor,
    signatures: Tensor,
    table: CacheTable,
    last_used: Tensor,
    uses: Tensor,
    similarity: float,
    eviction: str,
) -> CacheInsertion:
    """Which rows become entries.

    The rows are taken one by one, in order. One that is similar to an entry, as `cache_lookup`
    says, uses it. Any other row takes the lowest free entry or, where none is free, evicts one:

    {eviction}

    Rows see the entries that earlier ones have taken. The k-th row counts as time max(last_used) +
    1 + k. On the CPU only; not differentiable.

    Args:
        x: [R, G] floating.
        signatures: [R, L] int64, of `cache_signatures`; a row with -1 in the first column is passed
            over.
        table: the entries; nothing is written to it.
        last_used: [M] int64, when each entry was used last.
        uses: [M] int64, how often.
        similarity: in (0, 1].
        eviction: a name from above.

    Returns:
        The rows that have become entries, and last_used and uses afterwards.

    Raises:
        TypeError: table is not a CacheTable.
        ValueError: similarity is out of range, or the eviction unknown.
        RuntimeError: a shape, dtype or device does not fit.
    """
    keys, of_keys = _entries("cache_insert", table)
    check_number("cache_insert", "similarity", similarity)
    op = _ops.cache_insert.default
    return CacheInsertion(
        *_call(op, x, signatures, keys, of_keys, last_used, uses, similarity, eviction)
    )
