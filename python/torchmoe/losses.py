"""Losses that keep the experts evenly used, in addition to `torchmoe.ops.load_balancing_loss`.

Each is a few ops; sums over tokens have the same bits for any number of threads. In the formulas
p = score_function(logits), q = p / sum of p over the experts, and CV^2 = variance / mean^2 over the
E experts, the variance with divisor E. Tokens that token_mask excludes do not count; without a
counted token every term is 0. The caller chooses the coefficient, as in
`Balance(losses=[("importance_loss", 0.1), (my_function, 0.01)])`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchmoe import ops
from torchmoe._by_expert import by_expert
from torchmoe._checks import (
    check_among,
    check_at_least,
    check_choice,
    check_positive,
    check_tensor,
    check_token_mask,
)
from torchmoe._wide import wide, wide_dtype
from torchmoe.ops import SCORE_FUNCTIONS


class LossInputs(NamedTuple):
    """What a layer gives to each of its loss terms; T counts the flattened tokens."""

    logits: Tensor
    """[T, E], float32 or wider, with their gradient."""
    weights: Tensor
    """[T, K], with their gradient; K + 1 columns with assistance."""
    indices: Tensor
    """[T, K] int64, the expert of each weight; -1 where there is none."""
    token_mask: Tensor | None
    """[T] bool, True = the token counts."""
    score_function: str
    """The gate's."""
    num_experts: int
    """E."""
    top_k: int
    """K."""
    clean_logits: Tensor
    """[T, E], the logits before the router added noise to them, or the logits if it added none."""
    noise_deviation: float | None
    """The standard deviation of the router's noise, above 0; None if it added none."""


#: A term of a layer's auxiliary loss, unweighted: a scalar tensor.
Loss = Callable[[LossInputs], Tensor]


def importance_loss(
    weights: Tensor, indices: Tensor, num_experts: int, *, token_mask: Tensor | None = None
) -> Tensor:
    """How unevenly the gates' weights are spread: CV^2 of importance_i = sum over tokens of w_ti.

    w_ti is token t's weight for expert i, 0 if it did not choose i. Shazeer et al., arXiv
    1701.06538, equations 6 and 7.

    Args:
        weights: [T, K], from `torchmoe.ops.gate_weights`.
        indices: [T, K] int64, their experts; an id outside [0, E) does not count.
        num_experts: E.
        token_mask: [T] bool, True = the token counts.

    Returns:
        A scalar >= 0, differentiable in weights.

    Raises:
        TypeError: an argument has another type.
        ValueError: num_experts is below 1.
        RuntimeError: a shape or dtype does not fit.
    """
    check_at_least("importance_loss", "num_experts", num_experts, 1)
    check_tensor("importance_loss", "weights", weights)
    check_tensor("importance_loss", "indices", indices)
    if indices.dtype != torch.int64 or indices.device != weights.device:
        raise RuntimeError(
            f"importance_loss: indices must be int64 on {weights.device}, as weights are, "
            f"got {indices.dtype} on {indices.device}"
        )
    if weights.dim() != 2 or weights.shape != indices.shape:
        raise RuntimeError(
            "importance_loss: weights must be [num_tokens, top_k], as indices are, "
            f"got shapes {list(weights.shape)} and {list(indices.shape)}"
        )
    if not weights.is_floating_point():
        raise RuntimeError(f"importance_loss: weights must be floating, got {weights.dtype}")
    check_token_mask("importance_loss", token_mask, weights, 1)
    by_token = by_expert(weights, indices, num_experts)  # [T, E]
    return _cv_squared(ops.mean_over_tokens(by_token, token_mask=token_mask))


def load_loss(
    logits: Tensor,
    top_k: int,
    *,
    noisy_logits: Tensor | None = None,
    deviation: float | None = None,
    token_mask: Tensor | None = None,
) -> Tensor:
    """How unevenly tokens are spread, smoothly: CV^2 of load_i = sum over tokens of P_ti.

        P_ti = Phi((logit_ti - the top_k-th largest noisy logit of the token's other experts) /
               deviation)

    is the probability that the token chooses expert i if only that expert's noise is drawn again.
    Shazeer et al., arXiv 1701.06538, appendix A, equations 8 to 11, with one deviation for all
    experts as in V-MoE (arXiv 2106.05974). A layer takes the deviation of the router's noise,
    `Router(logit_noise=)`, or 1 / E while the router adds none.

    Args:
        logits: [T, E], before noise.
        top_k: K, in [1, E]; at E every P is 1 and the loss 0.
        noisy_logits: [T, E], the logits that ranked the experts; None uses logits for both.
        deviation: standard deviation of the noise, above 0; None is 1 / E.
        token_mask: [T] bool, True = the token counts.

    Returns:
        A scalar >= 0, differentiable in both logits.

    Raises:
        TypeError: an argument has another type.
        ValueError: top_k or deviation is out of range.
        RuntimeError: a shape or dtype does not fit.
    """
    _check("load_loss", logits, token_mask)
    num_experts = logits.shape[1]
    check_among("load_loss", "top_k", top_k, num_experts)
    if deviation is None:
        deviation = 1 / num_experts
    else:
        deviation = check_positive("load_loss", "deviation", deviation)
    if noisy_logits is not None:
        check_tensor("load_loss", "noisy_logits", noisy_logits)
        if (noisy_logits.shape, noisy_logits.dtype) != (logits.shape, logits.dtype):
            raise RuntimeError(
                f"load_loss: noisy_logits must be {logits.dtype} of shape {list(logits.shape)}, as "
                f"logits are, got {noisy_logits.dtype} of shape {list(noisy_logits.shape)}"
            )
    if top_k == num_experts:
        return logits.new_zeros((), dtype=wide_dtype(logits.dtype))
    noisy = logits if noisy_logits is None else noisy_logits
    logits, noisy = (_wide_and_finite(z) for z in (logits, noisy))
    if token_mask is not None:
        # A gradient of 0 times the slope at NaN would be NaN.
        logits, noisy = (z.masked_fill(~token_mask.unsqueeze(1), 0) for z in (logits, noisy))
    largest = noisy.topk(top_k + 1, dim=1).values  # [T, K + 1]
    kept_out, let_in = largest[:, top_k:], largest[:, top_k - 1 : top_k]  # [T, 1] each
    # Without an expert that is among the top_k, the next one takes its place.
    threshold = torch.where(noisy > kept_out, kept_out, let_in)  # [T, E]
    chance = torch.special.ndtr((logits - threshold) / deviation)
    return _cv_squared(ops.mean_over_tokens(chance, token_mask=token_mask))


def local_entropy_loss(
    logits: Tensor, *, score_function: str, token_mask: Tensor | None = None
) -> Tensor:
    """How undecided the router is about a token: the mean over tokens of the entropy of q, in nats.

    The minimum, 0, is reached when the router is certain of one expert for each token. LIMoE (arXiv
    2206.02770), section 2.2.

    Args:
        logits: [T, E].
        score_function: "softmax" or "sigmoid".
        token_mask: [T] bool, True = the token counts.

    Returns:
        A scalar in [0, log E], differentiable in logits.

    Raises:
        TypeError: an argument has another type.
        ValueError: an unknown score function.
        RuntimeError: a shape or dtype does not fit.
    """
    shares = _shares("local_entropy_loss", logits, score_function, token_mask)
    of_tokens = _entropy(shares).unsqueeze(-1)  # [T, 1]
    return ops.mean_over_tokens(of_tokens, token_mask=token_mask).squeeze(0)


def global_entropy_loss(
    logits: Tensor, *, score_function: str, token_mask: Tensor | None = None
) -> Tensor:
    """How unevenly the experts are used on average: log E - entropy of the mean q, in nats.

    0 where the mean over tokens of q is even. LIMoE (arXiv 2206.02770), section 2.2.

    Args:
        logits: [T, E].
        score_function: "softmax" or "sigmoid".
        token_mask: [T] bool, True = the token counts.

    Returns:
        A scalar in [0, log E], differentiable in logits.

    Raises:
        TypeError: an argument has another type.
        ValueError: an unknown score function.
        RuntimeError: a shape or dtype does not fit.
    """
    shares = _shares("global_entropy_loss", logits, score_function, token_mask)
    mean = ops.mean_over_tokens(shares, token_mask=token_mask)
    even = math.log(logits.shape[1]) * mean.sum()  # nothing counted: 0 - 0
    return even - _entropy(mean)


def mutual_information_loss(
    logits: Tensor, *, score_function: str, token_mask: Tensor | None = None
) -> Tensor:
    """Minus the mutual information of token and expert: mean entropy of q - entropy of the mean q.

    The minimum, -log E, is reached when the router is certain for each token and uses all experts
    evenly. Mod-Squad (arXiv 2212.08066), section 3.3, with tokens instead of tasks; LIMoE's two
    entropies with equal weights.

    Args:
        logits: [T, E].
        score_function: "softmax" or "sigmoid".
        token_mask: [T] bool, True = the token counts.

    Returns:
        A scalar in [-log E, 0], differentiable in logits.

    Raises:
        TypeError: an argument has another type.
        ValueError: an unknown score function.
        RuntimeError: a shape or dtype does not fit.
    """
    shares = _shares("mutual_information_loss", logits, score_function, token_mask)
    of_tokens = _entropy(shares).unsqueeze(-1)  # [T, 1]
    both = torch.cat([shares, of_tokens], dim=1)  # one pass over the tokens
    means = ops.mean_over_tokens(both, token_mask=token_mask)  # [E + 1]
    return means[-1] - _entropy(means[:-1])


def _check(name: str, logits: Tensor, token_mask: Tensor | None) -> None:
    """Raises RuntimeError where the arguments that the terms share do not fit."""
    check_tensor(name, "logits", logits)
    if logits.dim() != 2 or not logits.is_floating_point():
        raise RuntimeError(
            f"{name}: logits must be [num_tokens, num_experts] and floating, "
            f"got {logits.dtype} of shape {list(logits.shape)}"
        )
    if logits.shape[1] < 1:
        raise RuntimeError(
            f"{name}: logits must be of at least one expert, got shape {list(logits.shape)}"
        )
    check_token_mask(name, token_mask, logits, 1)


def _shares(name: str, logits: Tensor, score_function: str, token_mask: Tensor | None) -> Tensor:
    """Q for every token; 0, and no gradient, for tokens that do not count: [T, E].

    Errors name the term `name`.
    """
    _check(name, logits, token_mask)
    check_choice(name, "score_function", score_function, SCORE_FUNCTIONS)
    ids = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape)
    if token_mask is not None:
        ids = ids.masked_fill(~token_mask.unsqueeze(1), -1)
    # The share of a single expert is constant, and the op refuses a gradient that is always 0.
    logits = logits.detach() if logits.shape[1] == 1 else logits
    return ops.gate_weights(
        logits, ids, score_function=score_function, normalize="topk", estimator="exact"
    )


def _entropy(shares: Tensor) -> Tensor:
    """In nats, over the last dimension."""
    # The derivative of q log q is infinite at 0, that of a softmax is 0 there: a product of NaN.
    tiny = torch.finfo(shares.dtype).tiny
    return -(shares * shares.clamp(min=tiny).log()).sum(dim=-1)


def _wide_and_finite(logits: Tensor) -> Tensor:
    """The logits in float32 or wider and clamped, as infinite ones would have a NaN difference."""
    values = wide(logits)
    most = torch.finfo(values.dtype).max / 4
    return values.clamp(-most, most)


def _cv_squared(values: Tensor) -> Tensor:
    mean = values.mean()
    scale = torch.where(mean == 0, 1.0, mean)
    return ((values - mean) / scale).square().mean()


#: The terms that a layer knows by name, apart from load_balancing_loss.
LOSSES: dict[str, Loss] = {
    "router_z_loss": lambda given: ops.router_z_loss(given.logits, token_mask=given.token_mask),
    "importance_loss": lambda given: importance_loss(
        given.weights, given.indices, given.num_experts, token_mask=given.token_mask
    ),
    "load_loss": lambda given: load_loss(
        given.clean_logits,
        given.top_k,
        noisy_logits=given.logits,
        deviation=given.noise_deviation,
        token_mask=given.token_mask,
    ),
    "local_entropy_loss": lambda given: local_entropy_loss(
        given.logits, score_function=given.score_function, token_mask=given.token_mask
    ),
    "global_entropy_loss": lambda given: global_entropy_loss(
        given.logits, score_function=given.score_function, token_mask=given.token_mask
    ),
    "mutual_information_loss": lambda given: mutual_information_loss(
        given.logits, score_function=given.score_function, token_mask=given.token_mask
    ),
}
