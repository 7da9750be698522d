"""Slow, obvious answers for every op: loops over tokens, slots and experts, in float64.

Each function takes its op's arguments under the op's names. Autograd through a reference gives
the reference gradient; where an op's gradient is by definition not the derivative of its value
(straight_through, scale_gradient, attach_loss), the definition stands here in closed form.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def is_routed(expert: int, num_experts: int) -> bool:
    """An id outside [0, num_experts) means: this slot goes nowhere."""
    return 0 <= expert < num_experts


def _stack(parts: list[Tensor], shape: tuple[int, ...], like: Tensor) -> Tensor:
    if not parts:
        return torch.zeros(shape, dtype=torch.float64, device=like.device)
    return torch.stack(parts).reshape(shape)


# --- decide -------------------------------------------------------------------------------------


def _rank(value: float) -> tuple[bool, float]:
    """The key that sorts larger values first and NaN last."""
    return math.isnan(value), 0.0 if math.isnan(value) else -value


def _by_rank(scores: Tensor, tie_break: Tensor | None) -> list[int]:
    """The experts of one token, best first: by score, then by tie_break, then by id."""
    row = scores.tolist()
    ties = [0.0] * len(row) if tie_break is None else tie_break.tolist()
    return sorted(range(len(row)), key=lambda e: (_rank(row[e]), _rank(ties[e]), e))


def select_experts(
    scores: Tensor,
    top_k: int,
    *,
    selection_bias: Tensor | None = None,
    token_mask: Tensor | None = None,
    tie_break: Tensor | None = None,
) -> Tensor:
    """Sort each token's experts by score, then tie_break, both as _rank says, then id."""
    num_tokens = scores.shape[0]
    ranked = scores.double()
    if selection_bias is not None:
        ranked = ranked + selection_bias.double()
    result = torch.full((num_tokens, top_k), -1, dtype=torch.int64)
    for token in range(num_tokens):
        if token_mask is not None and not token_mask[token]:
            continue
        order = _by_rank(ranked[token], None if tie_break is None else tie_break[token])
        result[token] = torch.tensor(order[:top_k])
    return result


def slot_order(num_tokens: int, top_k: int, order: str) -> list[tuple[int, int]]:
    """The (token, choice) pairs in the order in which they ask for a place."""
    if order == "choice":
        return [(t, j) for j in range(top_k) for t in range(num_tokens)]
    return [(t, j) for t in range(num_tokens) for j in range(top_k)]


def limit_capacity(
    indices: Tensor,
    capacity: Tensor,
    *,
    order: str = "choice",
    priority: Tensor | None = None,
    overflow: str = "drop",
    scores: Tensor | None = None,
    backup: Tensor | None = None,
    tie_break: Tensor | None = None,
) -> Tensor:
    """Serve slots one after another, each with what is left at that moment."""
    num_experts = capacity.numel()
    queue = slot_order(*indices.shape, order)
    if priority is not None:
        queue.sort(key=lambda slot: _rank(float(priority[slot])))
    left = capacity.tolist()
    # What a slot has got, or still asks for.
    held = [[e if is_routed(e, num_experts) else -1 for e in row] for row in indices.tolist()]
    for token, choice in queue:
        expert = held[token][choice]
        if expert == -1:
            continue
        wishes = [expert]
        if overflow == "backup":
            wishes.append(int(backup[expert]))
        if overflow != "drop":
            wishes += _by_rank(scores[token], None if tie_break is None else tie_break[token])
        others = held[token][:choice] + held[token][choice + 1 :]
        # Its own expert a slot may share with another of its token: that is what was asked for.
        free = [e for e in wishes if left[e] > 0 and (e == expert or e not in others)]
        held[token][choice] = free[0] if free else -1
        if free:
            left[free[0]] -= 1
    return torch.tensor(held, dtype=torch.int64).reshape(indices.shape)


# --- weigh --------------------------------------------------------------------------------------


def softmax(row: Tensor) -> Tensor:
    """Softmax of one row; a row of nothing but -inf has no expert, so every probability is 0."""
    if row.numel() == 0 or bool((row == -math.inf).all()):
        return row * 0.0 if row.numel() == 0 else torch.zeros_like(row)
    exponentials = torch.exp(row - row.max().detach())
    return exponentials / exponentials.sum()


def log_sigmoid(logits: Tensor) -> Tensor:
    """log(1 / (1 + exp(-logit))) without its underflow."""
    return -torch.log1p(torch.exp(-logits.abs())) + logits.clamp(max=0)


def probabilities(row: Tensor, score_function: str) -> Tensor:
    """One token's p over all experts."""
    return softmax(row) if score_function == "softmax" else torch.sigmoid(row)


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The linear map x W^T + b."""
    logits = (x.double()[:, None, :] * weight.double()[None, :, :]).sum(-1)
    return logits if bias is None else logits + bias.double()


def _token_weights(row: Tensor, experts: list[int], score_function: str, normalize: str) -> Tensor:
    """Weights of one token's routed slots, which name `experts`."""
    if normalize == "uniform":
        return row.new_full((len(experts),), 1.0 / max(len(experts), 1))
    if normalize == "topk" and score_function == "softmax":
        return softmax(row[experts])
    chosen = probabilities(row, score_function)[experts]
    if normalize == "none":
        return chosen
    total = chosen.sum()
    return torch.zeros_like(chosen) if bool(total == 0) else chosen / total


def gate_weights(
    logits: Tensor, indices: Tensor, *, score_function: str, normalize: str, estimator: str
) -> Tensor:
    """The weight of every slot; 0 for a slot that is not routed."""
    num_tokens, num_experts = logits.shape
    weights = []
    for token in range(num_tokens):
        row = logits[token].double()
        ids = indices[token].tolist()
        routed = [e for e in ids if is_routed(e, num_experts)]
        value = _token_weights(row, routed, score_function, normalize)
        if estimator == "straight_through" and row.requires_grad:
            # The selection and the normalisation count as the identity: the value is w, the
            # gradient is that of p at the slot's expert.
            chosen = probabilities(row, score_function)[routed]
            value = value.detach() + (chosen - chosen.detach())
        position = 0
        for expert in ids:
            if is_routed(expert, num_experts):
                weights.append(value[position])
                position += 1
            else:
                weights.append(row.new_zeros(()))
    return _stack(weights, tuple(indices.shape), logits)


def straight_through_gradient(
    grad: Tensor, logits: Tensor, indices: Tensor, score_function: str
) -> Tensor:
    """J_score^T dL/dp, with dL/dp_i the sum of g_j over the slots that name expert i."""
    num_tokens, num_experts = logits.shape
    result = torch.zeros(num_tokens, num_experts, dtype=torch.float64)
    for token in range(num_tokens):
        grad_p = [0.0] * num_experts
        for j, expert in enumerate(indices[token].tolist()):
            if is_routed(expert, num_experts):
                grad_p[expert] += float(grad[token, j])
        p = probabilities(logits[token].detach().double(), score_function).tolist()
        for e in range(num_experts):
            for i in range(num_experts):
                if score_function == "softmax":
                    derivative = p[i] * ((i == e) - p[e])
                else:
                    derivative = p[i] * (1.0 - p[i]) * (i == e)
                result[token, e] += grad_p[i] * derivative
    return result


# --- dispatch -----------------------------------------------------------------------------------


def dispatch_plan(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots by expert, in slot order within an expert; the unrouted ones last, in slot order."""
    ids = indices.flatten().tolist()
    row_to_slot = []
    offsets = [0]
    for expert in range(num_experts):
        row_to_slot += [slot for slot, e in enumerate(ids) if e == expert]
        offsets.append(len(row_to_slot))
    row_to_slot += [slot for slot, e in enumerate(ids) if not is_routed(e, num_experts)]
    slot_to_row = [0] * len(ids)
    for row, slot in enumerate(row_to_slot):
        slot_to_row[slot] = row
    return (
        torch.tensor(offsets, dtype=torch.int64),
        torch.tensor(row_to_slot, dtype=torch.int64),
        torch.tensor(slot_to_row, dtype=torch.int64).reshape(indices.shape),
    )


def permute(x: Tensor, expert_offsets: Tensor, row_to_slot: Tensor, slot_to_row: Tensor) -> Tensor:
    """Row r is the token of its slot; rows past the last offset are zero."""
    top_k = slot_to_row.size(1)
    kept = int(expert_offsets[-1])
    rows = [
        x[slot // top_k].double() if row < kept else x.new_zeros(x.size(1)).double()
        for row, slot in enumerate(row_to_slot.tolist())
    ]
    return _stack(rows, (row_to_slot.numel(), x.size(1)), x)


def unpermute(
    rows: Tensor,
    weights: Tensor,
    expert_offsets: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
) -> Tensor:
    """y_t = the sum of weight * row over the token's routed slots."""
    del row_to_slot
    kept = int(expert_offsets[-1])
    tokens = []
    for token in range(slot_to_row.size(0)):
        y = torch.zeros(rows.size(1), dtype=torch.float64)
        for j, row in enumerate(slot_to_row[token].tolist()):
            if row < kept:
                y = y + weights[token, j].double() * rows[row].double()
        tokens.append(y)
    return _stack(tokens, (slot_to_row.size(0), rows.size(1)), rows)


# --- compute ------------------------------------------------------------------------------------


def grouped_linear(
    rows: Tensor, weight: Tensor, bias: Tensor | None, expert_offsets: Tensor
) -> Tensor:
    """Row r of expert e becomes W_e r + b_e; rows past the last offset are zero."""
    offsets = expert_offsets.tolist()
    result = []
    for row in range(rows.size(0)):
        expert = sum(row >= end for end in offsets[1:])
        if expert == weight.size(0):
            result.append(torch.zeros(weight.size(1), dtype=torch.float64))
            continue
        value = weight[expert].double() @ rows[row].double()
        result.append(value if bias is None else value + bias[expert].double())
    return _stack(result, (rows.size(0), weight.size(1)), rows)


def sum_by_expert(rows: Tensor, expert_offsets: Tensor) -> Tensor:
    """sums_e = the sum of the rows from expert e's first to its last."""
    offsets = expert_offsets.tolist()
    sums = []
    for begin, end in pairwise(offsets):
        total = torch.zeros(rows.size(1), dtype=torch.float64)
        for row in range(begin, end):
            total = total + rows[row].double()
        sums.append(total)
    return _stack(sums, (len(offsets) - 1, rows.size(1)), rows)


def _activations(kind: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """The formulas of one kind in tests/activations.inc, by name."""
    lines = (Path(__file__).parents[1] / "activations.inc").read_text()
    words = {name: getattr(torch, name) for name in ("erf", "exp", "log", "tanh", "sigmoid")}
    words |= {"sqrt": _square_root, "pi": math.pi, "positive": torch.relu}
    return {
        name: eval(f"lambda x: {formula}", dict(words))
        for name, formula in re.findall(
            rf"^ACTIVATION\((\w+), {kind}, (.+)\)$", lines, flags=re.MULTILINE
        )
    }


def _square_root(x: Tensor | float) -> Tensor | float:
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


PLAIN = _activations("plain")
GATED = _activations("gated")


def _softcap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def activate(
    pre: Tensor,
    activation: str,
    *,
    alpha: float = 1,
    limit: float | None = None,
    up_offset: float = 0,
    gate_softcap: float | None = None,
    up_softcap: float | None = None,
    interleaved: bool = False,
) -> Tensor:
    """A(pre) of one row; gated ones take act(gate) * up, or what the settings make of it."""
    if activation in PLAIN:
        return PLAIN[activation](pre)
    gate, up = (pre[::2], pre[1::2]) if interleaved else pre.chunk(2)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if gate_softcap is None:
        activated = GATED[activation](alpha * gate) / alpha
    else:
        # f(u) = u s(u), and s changes no more so far out.
        inner = (alpha * gate).clamp(-300, 300)
        factor = GATED[activation](inner) / inner
        activated = _softcap(gate, gate_softcap) * factor
    return activated * (_softcap(up, up_softcap) + up_offset)


def expert_mlp(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    **shaped: Any,
) -> Tensor:
    """y_t = sum over routed slots of w * (W_out A(W_in x + b_in) + b_out)."""
    num_tokens, hidden = x.shape
    xs, w_ins, w_outs = (t.double().unbind() for t in (x, w_in, w_out))
    tokens = []
    for token in range(num_tokens):
        y = torch.zeros(hidden, dtype=torch.float64)
        for j, expert in enumerate(indices[token].tolist()):
            if not is_routed(expert, len(w_ins)):
                continue
            pre = w_ins[expert] @ xs[token]
            if b_in is not None:
                pre = pre + b_in[expert].double()
            out = w_outs[expert] @ activate(pre, activation, **shaped)
            if b_out is not None:
                out = out + b_out[expert].double()
            y = y + weights[token, j].double() * out
        tokens.append(y)
    return _stack(tokens, (num_tokens, hidden), x)


def attach_dense_gradient(
    y: Tensor,
    probs: Tensor,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    **shaped: Any,
) -> Tensor:
    """y + sum over all experts of (p_i - the same value as a constant) * E_i(x)."""
    result = y.double()
    for i in range(w_out.size(0)):
        everyone = torch.full((x.size(0), 1), i)
        ones = torch.ones(everyone.shape, dtype=torch.float64)
        output = expert_mlp(x, everyone, ones, w_in, b_in, w_out, b_out, activation, **shaped)
        p = probs[:, i : i + 1].double()
        result = result + (p - p.detach()) * output.detach()
    return result


# --- account ------------------------------------------------------------------------------------


def load_balancing_loss(
    logits: Tensor, fraction: Tensor, *, score_function: str, token_mask: Tensor | None = None
) -> Tensor:
    """Mean over those leading dimensions with a counted token of E * sum_i fraction_i * P_i."""
    num_tokens, num_experts = logits.shape[-2:]
    groups = math.prod(logits.shape[:-2])
    logits = logits.reshape(groups, num_tokens, num_experts).double()
    fraction = fraction.reshape(groups, num_experts).double()
    mask = torch.ones(groups, num_tokens, dtype=torch.bool)
    if token_mask is not None:
        mask = token_mask.reshape(groups, num_tokens)
    total = torch.zeros((), dtype=torch.float64)
    counted = 0
    for group in range(groups):
        shares = []
        for token in range(num_tokens):
            if mask[group, token]:
                p = probabilities(logits[group, token], score_function)
                mass = p.sum()
                shares.append(torch.zeros_like(p) if bool(mass == 0) else p / mass)
        if shares:
            counted += 1
            mean = torch.stack(shares).sum(0) / len(shares)
            total = total + num_experts * (fraction[group] * mean).sum()
    return total / counted if counted else total


def mean_over_tokens(values: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """The counted tokens' sum over their number, for each leading dimension and column."""
    *leading, num_tokens, columns = values.shape
    groups = values.reshape(math.prod(leading), num_tokens, columns).double()
    mask = torch.ones(len(groups), num_tokens, dtype=torch.bool)
    if token_mask is not None:
        mask = token_mask.reshape(mask.shape)
    means = [
        group[counts].sum(0) / max(int(counts.sum()), 1)
        for group, counts in zip(groups, mask, strict=True)
    ]
    return _stack(means, (*leading, columns), values)


def router_z_loss(logits: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """Mean over counted tokens of logsumexp(logits)^2."""
    rows = logits.reshape(-1, logits.size(-1)).double()
    if token_mask is not None:
        rows = rows[token_mask.reshape(-1)]
    if rows.size(0) == 0:
        return torch.zeros((), dtype=torch.float64) * logits.double().sum()
    return torch.logsumexp(rows, -1).square().sum() / rows.size(0)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad * scale.double(), None


def scale_gradient(x: Tensor, scale: Tensor) -> Tensor:
    """A copy of x forward; the gradient times scale backward."""
    return _ScaleGradient.apply(x.double(), scale)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.loss, ctx.scale = loss, scale
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full_like(ctx.loss, ctx.scale), None


def attach_loss(x: Tensor, loss: Tensor, scale: float = 1.0) -> Tensor:
    """A copy of x forward; backward the loss gets the gradient `scale`, whatever reaches x."""
    return _AttachLoss.apply(x.double(), loss.double(), scale)
