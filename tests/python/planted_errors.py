"""Estimators with one error each, which check_surrogate must find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchmoe import ops
from torchmoe._by_expert import by_expert
from torchmoe.nn import (
    Capacity,
    DefaultVector,
    Estimator,
    Exact,
    GumbelStraightThrough,
    Router,
    SparseMixer,
    StraightThrough,
    StraightThroughDense,
)
from torchmoe.nn.estimators._dense_gradient import attach_dense_gradient

Weigh = Callable[[Estimator, Tensor, Tensor], Tensor]


def replaced(value: Tensor, learner: Tensor) -> Tensor:
    """The value of one with the gradient of the other."""
    return value.detach() + (learner - learner.detach())


def scaled(base: type[Estimator], factor: float, **settings: Any) -> Callable[[], Estimator]:
    """The router's gradient times a factor."""

    class Scaled(base):  # type: ignore[misc, valid-type]
        def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
            return super().weigh(ops.scale_gradient(logits, torch.tensor(factor)), indices)

        def combine(
            self,
            x: Tensor,
            logits: Tensor,
            indices: Tensor,
            weights: Tensor,
            *rest: Any,
            **more: Any,
        ) -> Any:
            scaled_logits = ops.scale_gradient(logits, torch.tensor(factor))
            return super().combine(x, scaled_logits, indices, weights, *rest, **more)

    return lambda: Scaled(**settings)


def weighing(base: type[Estimator], weigh: Weigh, **settings: Any) -> Callable[[], Estimator]:
    """Another `weigh`; it gets the estimator as it is meant to be."""

    class Planted(base):  # type: ignore[misc, valid-type]
        def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
            return weigh(_Meant(base, self), logits, indices)

    return lambda: Planted(**settings)


class _Meant:
    """An estimator's methods as its own class has them."""

    def __init__(self, base: type[Estimator], instance: Estimator) -> None:
        self._base, self._instance = base, instance

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._base, name, None)
        return found.__get__(self._instance) if callable(found) else getattr(self._instance, name)


def chosen_scores(e: Estimator, logits: Tensor, indices: Tensor) -> Tensor:
    return e.probs(logits).gather(1, indices.clamp(min=0))


def without_slot(j: int) -> Weigh:
    def weigh(e: Estimator, logits: Tensor, indices: Tensor) -> Tensor:
        weights = e.weigh(logits, indices)
        keep = torch.arange(weights.shape[1]) != j
        return torch.where(keep, weights, weights.detach())

    return weigh


def stale_tokens(e: Estimator, logits: Tensor, indices: Tensor) -> Tensor:
    return replaced(e.weigh(logits, indices), e.weigh(logits, indices.roll(1, 0)))


def swapped_slots(e: Estimator, logits: Tensor, indices: Tensor) -> Tensor:
    weights = e.weigh(logits, indices)
    return replaced(weights, weights.flip(1))


def next_expert(e: Estimator, logits: Tensor, indices: Tensor) -> Tensor:
    following = (indices + 1) % logits.shape[1]
    return replaced(e.weigh(logits, indices), e.weigh(logits, following))


def diagonal_of_softmax(e: Estimator, logits: Tensor, indices: Tensor) -> Tensor:
    p = chosen_scores(e, logits, indices).detach()
    z = logits.gather(1, indices.clamp(min=0))
    return replaced(e.weigh(logits, indices), p * (1 - p) * z)


def outer_of_softmax(e: Estimator, logits: Tensor, indices: Tensor) -> Tensor:
    """Only -p_i p_k of the Jacobian."""
    p = chosen_scores(e, logits, indices)
    z = logits.gather(1, indices.clamp(min=0))
    return replaced(e.weigh(logits, indices), p - p.detach() * z)


def sigmoid_for_softmax(e: Estimator, logits: Tensor, indices: Tensor) -> Tensor:
    return replaced(e.weigh(logits, indices), logits.sigmoid().gather(1, indices.clamp(min=0)))


def normalised_too(e: Estimator, logits: Tensor, indices: Tensor) -> Tensor:
    p = chosen_scores(e, logits, indices)
    return replaced(e.weigh(logits, indices), p / p.sum(1, keepdim=True))


def normaliser_constant(e: Estimator, logits: Tensor, indices: Tensor) -> Tensor:
    p = chosen_scores(e, logits, indices)
    return replaced(e.weigh(logits, indices), p / p.sum(1, keepdim=True).detach())


def plain_scores(e: Estimator, logits: Tensor, indices: Tensor) -> Tensor:
    return replaced(e.weigh(logits, indices), chosen_scores(e, logits, indices))


def twice(e: Estimator, logits: Tensor, indices: Tensor) -> Tensor:
    p = chosen_scores(e, logits, indices)
    return e.weigh(logits, indices) + (p - p.detach())


def mean_over_tokens(e: Estimator, logits: Tensor, indices: Tensor) -> Tensor:
    weights = e.weigh(logits, indices)
    return replaced(weights, weights.mean(0, keepdim=True).expand_as(weights))


def logits_for_scores(e: Estimator, logits: Tensor, indices: Tensor) -> Tensor:
    return replaced(e.weigh(logits, indices), logits.gather(1, indices.clamp(min=0)))


def factor_in_the_gradient(e: SparseMixer, logits: Tensor, indices: Tensor) -> Tensor:
    m, _ = e._multipliers(logits, indices)
    weights = e.weigh(logits, indices)
    return m * (weights / m).detach()


def score_of_all(e: SparseMixer, logits: Tensor, indices: Tensor) -> Tensor:
    """The softmax over all experts, none masked."""
    return replaced(e.weigh(logits, indices), chosen_scores(e, logits, indices))


def only_taken_masked(e: SparseMixer, logits: Tensor, indices: Tensor) -> Tensor:
    """The experts far below the largest compete too."""
    columns = []
    for j in range(indices.shape[1]):
        taken = by_expert(torch.ones_like(indices[:, :j]), indices[:, :j], logits.shape[1]) > 0
        q = logits.masked_fill(taken, -torch.inf).softmax(1)
        columns.append(q.gather(1, indices[:, j : j + 1]))
    return replaced(e.weigh(logits, indices), torch.cat(columns, 1))


def only_far_masked(e: SparseMixer, logits: Tensor, indices: Tensor) -> Tensor:
    """The experts of the slots before compete again."""
    nothing = torch.zeros_like(logits, dtype=torch.bool)
    q = e._compete(logits, nothing).softmax(1).nan_to_num()
    return replaced(e.weigh(logits, indices), q.gather(1, indices))


def chosen_alone(e: SparseMixer, logits: Tensor, indices: Tensor) -> Tensor:
    """g * m * onehot, without -q."""
    m, _ = e._multipliers(logits, indices)
    return replaced(e.weigh(logits, indices), m.detach() * logits.gather(1, indices))


def variance_for_mean(e: SparseMixer, logits: Tensor, indices: Tensor) -> Tensor:
    """g * (onehot - q), without m."""
    m, _ = e._multipliers(logits, indices)
    return replaced(e.weigh(logits, indices), m.log())


class AtTemperature(GumbelStraightThrough):
    """The gradient of the scores at the temperature of the noise."""

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        return replaced(
            super().weigh(logits, indices), super().weigh(logits / self.temperature, indices)
        )


class NoisyWeights(GumbelStraightThrough):
    """The gradient of the scores with noise in them."""

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        noisy = logits + torch.randn_like(logits)
        return replaced(super().weigh(logits, indices), super().weigh(noisy, indices))


Combine = Callable[..., Tensor]


def dense(combine: Combine) -> Callable[[], Estimator]:
    """Another `combine` for straight_through_dense."""

    class Planted(StraightThroughDense):
        def combine(
            self,
            x: Tensor,
            logits: Tensor,
            indices: Tensor,
            weights: Tensor,
            experts: Any,
            *,
            token_mask: Tensor | None = None,
        ) -> Tensor:
            probs = self.probs(logits, token_mask)
            return combine(self, x, probs, indices, weights, experts)

    return Planted


def dense_at(
    change: Callable[[Tensor], Tensor], *, of: str = "probs", weights_learn: bool = False
) -> Callable[[], Estimator]:
    """The right `combine`, except for a change to one of its parts."""

    def combine(
        e: Estimator, x: Tensor, probs: Tensor, indices: Tensor, weights: Tensor, experts: Any
    ) -> Tensor:
        y = experts(x, indices, weights if weights_learn else weights.detach())
        parts = {"probs": probs, "x": x}
        parts[of] = change(parts[of])
        return attach_dense_gradient(y, parts["probs"], parts["x"], experts)

    return dense(combine)


def served_only(
    e: Estimator, x: Tensor, probs: Tensor, indices: Tensor, weights: Tensor, experts: Any
) -> Tensor:
    served = by_expert(torch.ones_like(indices), indices, probs.shape[1])
    y = experts(x, indices, weights.detach())
    return attach_dense_gradient(y, probs * served, x, experts)


def others_only(
    e: Estimator, x: Tensor, probs: Tensor, indices: Tensor, weights: Tensor, experts: Any
) -> Tensor:
    served = by_expert(torch.ones_like(indices), indices, probs.shape[1])
    y = experts(x, indices, weights.detach())
    return attach_dense_gradient(y, probs * (1 - served), x, experts)


def experts_learn_densely(
    e: Estimator, x: Tensor, probs: Tensor, indices: Tensor, weights: Tensor, experts: Any
) -> Tensor:
    everyone = torch.arange(probs.shape[1]).expand(probs.shape)
    all_of_them = experts(x, everyone, probs)
    return replaced(experts(x, indices, weights), all_of_them)


def no_output_bias(
    e: Estimator, x: Tensor, probs: Tensor, indices: Tensor, weights: Tensor, experts: Any
) -> Tensor:
    w_in, b_in, w_out, _ = experts._weights
    y = experts(x, indices, weights.detach())
    return ops.attach_dense_gradient(y, probs, x, w_in, b_in, w_out, None, experts.activation)


def no_inner_bias(
    e: Estimator, x: Tensor, probs: Tensor, indices: Tensor, weights: Tensor, experts: Any
) -> Tensor:
    w_in, _, w_out, b_out = experts._weights
    y = experts(x, indices, weights.detach())
    return ops.attach_dense_gradient(y, probs, x, w_in, None, w_out, b_out, experts.activation)


class ForgetsTheMask(StraightThroughDense):
    """Gives masked tokens a gradient."""

    def combine(self, x: Tensor, logits: Tensor, *rest: Any, **more: Any) -> Tensor:
        return super().combine(x, logits, *rest)


class DefaultsDetached(DefaultVector):
    """The experts that did not serve a token teach the router nothing."""

    def probs(self, logits: Tensor, token_mask: Tensor | None = None) -> Tensor:
        return super().probs(logits, token_mask).detach()


class DefaultsTurned(DefaultVector):
    """A wrong sign for them."""

    def probs(self, logits: Tensor, token_mask: Tensor | None = None) -> Tensor:
        return ops.scale_gradient(super().probs(logits, token_mask), torch.tensor(-1.0))


class DefaultsOfTheNextExpert(DefaultVector):
    """A stale index: the gradient of another expert's score."""

    def probs(self, logits: Tensor, token_mask: Tensor | None = None) -> Tensor:
        probs = super().probs(logits, token_mask)
        return replaced(probs, probs.roll(1, 1))


K, E = 2, 5  # of the layer that is checked
ST, DENSE, MIX = StraightThrough, StraightThroughDense, SparseMixer
FREE = {"jitter": 3.0}  # several experts compete
PLANTED: dict[str, tuple[Callable[[], Estimator], dict[str, Any]]] = {
    "exact: lost factor": (scaled(Exact, 0.5), {}),
    "exact: wrong sign": (scaled(Exact, -1.0), {}),
    "exact: a slot missing": (weighing(Exact, without_slot(0)), {}),
    "exact: normaliser constant": (weighing(Exact, normaliser_constant), {}),
    "exact: normaliser forgotten": (weighing(Exact, plain_scores), {}),
    "exact: stale tokens": (weighing(Exact, stale_tokens), {}),
    "exact: slots swapped": (weighing(Exact, swapped_slots), {}),
    "straight_through: lost factor": (scaled(ST, 1 / K), {}),
    "straight_through: K and E swapped": (scaled(ST, K / E), {}),
    "straight_through: wrong sign": (scaled(ST, -1.0), {}),
    "straight_through: first slot missing": (weighing(ST, without_slot(0)), {}),
    "straight_through: last slot missing": (weighing(ST, without_slot(K - 1)), {}),
    "straight_through: stale tokens": (weighing(ST, stale_tokens), {}),
    "straight_through: slots swapped": (weighing(ST, swapped_slots), {}),
    "straight_through: next expert": (weighing(ST, next_expert), {}),
    "straight_through: softmax's diagonal": (weighing(ST, diagonal_of_softmax), {}),
    "straight_through: softmax's outer product": (weighing(ST, outer_of_softmax), {}),
    "straight_through: sigmoid for softmax": (weighing(ST, sigmoid_for_softmax), {}),
    "straight_through: normalised": (weighing(ST, normalised_too), {}),
    "straight_through: counted twice": (weighing(ST, twice), {}),
    "straight_through: mean over tokens": (weighing(ST, mean_over_tokens), {}),
    "straight_through: logits for scores": (weighing(ST, logits_for_scores), {}),
    "dense: lost factor": (dense_at(lambda p: p / E), {}),
    "dense: wrong sign": (dense_at(torch.neg), {}),
    "dense: next expert": (dense_at(lambda p: p.roll(1, 1)), {}),
    "dense: experts reversed": (dense_at(lambda p: p.flip(1)), {}),
    "dense: stale tokens": (dense_at(lambda p: p.roll(1, 0)), {}),
    "dense: another token's outputs": (dense_at(lambda x: x.roll(1, 0), of="x"), {}),
    "dense: the exact gradient too": (dense_at(lambda p: p, weights_learn=True), {}),
    "dense: chosen experts only": (dense(served_only), {}),
    "dense: other experts only": (dense(others_only), {}),
    "dense: dropped slots left out": (dense(served_only), {"top_k": E, "capacity": Capacity(0.6)}),
    "dense: every expert learns": (dense(experts_learn_densely), {}),
    "dense: output bias missing": (dense(no_output_bias), {"bias": True}),
    "dense: inner bias missing": (dense(no_inner_bias), {"bias": True}),
    "dense: masked tokens learn": (
        ForgetsTheMask,
        {"masked_tokens": 3, "bias": True, "router": Router(4, E, bias=True, dtype=torch.float64)},
    ),
    "default_vector: others detached": (DefaultsDetached, {}),
    "default_vector: others' wrong sign": (DefaultsTurned, {}),
    "default_vector: next expert": (DefaultsOfTheNextExpert, {}),
    "default_vector: K and E swapped": (scaled(DefaultVector, K / E), {}),
    "default_vector: a slot missing": (weighing(DefaultVector, without_slot(1)), {}),
    "sparsemixer: the factor in the gradient": (weighing(MIX, factor_in_the_gradient, **FREE), {}),
    "sparsemixer: nothing masked": (weighing(MIX, score_of_all, **FREE), {}),
    "sparsemixer: far experts compete": (weighing(MIX, only_taken_masked, jitter=0.1), {}),
    "sparsemixer: taken experts compete": (weighing(MIX, only_far_masked, **FREE), {}),
    "sparsemixer: -q missing": (weighing(MIX, chosen_alone, **FREE), {}),
    "sparsemixer: m missing": (weighing(MIX, variance_for_mean, **FREE), {}),
    "sparsemixer: wrong sign": (scaled(MIX, -1.0, **FREE), {}),
    "sparsemixer: last slot missing": (weighing(MIX, without_slot(K - 1), **FREE), {}),
    "sparsemixer: stale tokens": (weighing(MIX, stale_tokens, **FREE), {}),
    "gumbel: gradient at the temperature": (lambda: AtTemperature(2.0), {}),
    "gumbel: noise in the scores": (NoisyWeights, {}),
    "gumbel: lost factor": (scaled(GumbelStraightThrough, 0.9), {}),
    "gumbel: normalised": (weighing(GumbelStraightThrough, normalised_too), {}),
}
