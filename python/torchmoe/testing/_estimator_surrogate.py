"""Checks an estimator's gradient against the weights that it declares, in a layer made for it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from torchmoe._checks import (
    check_at_least,
    check_flag,
    check_not_negative,
)
from torchmoe.nn._sharding import refuse_sharded
from torchmoe.nn.balance import Balance
from torchmoe.nn.estimators.estimator import Estimator
from torchmoe.nn.estimators.registry import build_estimator
from torchmoe.nn.gate import Gate
from torchmoe.nn.moe import MoE
from torchmoe.nn.routers.context_router import route
from torchmoe.nn.routing import MoEOutput, before_drop
from torchmoe.testing._declared import OWNER, sampled
from torchmoe.testing._differences import Tensors
from torchmoe.testing._explanation import explanation
from torchmoe.testing._gradcheck import gradcheck
from torchmoe.testing._observation import (
    AVOID_TIES,
    Observation,
    Observer,
    UnstableSelectionError,
    compare,
    same_draws,
)
from torchmoe.testing._subject import Subject

_ATTEMPTS = 10
# What of the layer's outputs an estimator has a hand in.
_OUTPUT = "hidden_states"
# Both are sums of a few dozen float64 products, of order one.
_SAME_VALUE = 1e-12


def check_estimator(
    estimator: str | Estimator,
    *,
    seed: int,
    eps: float,
    num_tokens: int = 7,
    hidden_size: int = 4,
    intermediate_size: int | None = 3,
    num_experts: int = 5,
    top_k: int = 2,
    score_function: str = "softmax",
    normalize: str | None = None,
    masked_tokens: int = 0,
    training: bool = True,
    atol: float = 1e-6,
    rtol: float = 1e-5,
    fast_mode: bool = False,
    **layer: Any,  # noqa: ANN401 (the arguments of MoE)
) -> None:
    """Raises unless the gradient is the derivative of the formula in `check_surrogate`.

    Args:
        estimator: a registered name or an instance, which is copied.
        seed: of the layer's parameters, the tokens and the draws.
        eps: the step of the finite difference.
        num_tokens: T, of random tokens.
        hidden_size: H.
        intermediate_size: I.
        num_experts: E.
        top_k: K.
        score_function: of the gate.
        normalize: of the gate.
        masked_tokens: how many of the tokens do not count.
        training: the layer's mode; estimators that sample draw the same numbers in each evaluation.
        atol: absolute tolerance.
        rtol: relative tolerance.
        fast_mode: checks one random direction instead of every entry.
        **layer: more arguments of `MoE`: capacity, experts, router, activation, bias.

    Raises:
        GradcheckError: the gradient, or the output, is another one.
        UnstableSelectionError: tokens whose surrogate does not jump within a step were not found.
        TypeError: an argument has another type, or a part of the layer is sharded.
        ValueError: a number is out of range, or the layer cannot be built.
    """
    check_at_least(OWNER, "num_tokens", num_tokens, 0)
    check_at_least(OWNER, "masked_tokens", masked_tokens, 0)
    for name, tolerance in (("atol", atol), ("rtol", rtol)):
        check_not_negative(OWNER, name, tolerance)
    for name, flag in (("training", training), ("fast_mode", fast_mode)):
        check_flag(OWNER, name, flag)
    estimator = copy.deepcopy(build_estimator(estimator))
    _check_signature(estimator)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        moe = MoE(
            hidden_size,
            intermediate_size,
            num_experts,
            top_k,
            gate=Gate(score_function, normalize, estimator),
            dtype=torch.float64,
            **{"balance": Balance(0), **layer},
        ).train(training)
        refuse_sharded(OWNER, "layer", moe)
        mask = torch.arange(num_tokens) >= masked_tokens if masked_tokens else None
        draws = torch.randn(1 + _ATTEMPTS, num_tokens, hidden_size, dtype=torch.float64)
        moe.update(moe(draws[0], token_mask=mask).routing)

    tolerances = {"eps": eps, "atol": atol, "rtol": rtol, "fast_mode": fast_mode}
    for x in draws[1:]:
        try:
            _check_at(moe, x, mask, seed, tolerances)
        except UnstableSelectionError as error:
            unstable = error
        else:
            return
    raise UnstableSelectionError(f"{unstable}; {AVOID_TIES}") from unstable


def _check_signature(estimator: Estimator) -> None:
    signature = inspect.signature(estimator.surrogate)
    try:
        signature.bind("logits", "selected", "indices")
    except TypeError:
        raise TypeError(
            f"{OWNER}: surrogate must be called as surrogate(logits, selected, indices), "
            f"got surrogate({', '.join(signature.parameters)})"
        ) from None


def _check_at(
    moe: MoE, x: Tensor, mask: Tensor | None, seed: int, tolerances: dict[str, Any]
) -> None:
    subject = Subject(OWNER, moe, x, {"token_mask": mask})
    with same_draws(seed, [x]):
        surrogate = EstimatorSurrogate(moe, x, mask)
    if surrogate.weights is None:
        gradcheck(_Layer(moe), x, kwargs={"token_mask": mask}, seed=seed, full=True, **tolerances)
        return

    first: Observation | None = None

    def learner(tensors: Tensors) -> Tensors:
        return {_OUTPUT: subject.outputs(tensors)[_OUTPUT]}

    def declared(tensors: Tensors) -> Tensors:
        (y,) = subject.outputs(tensors, surrogate).values()
        return {_OUTPUT: y}

    def learn(*tensors: Tensor) -> Tensor:
        with same_draws(seed, tensors):
            return learner(dict(zip(subject.tensors, tensors, strict=True)))[_OUTPUT]

    def declare(*tensors: Tensor) -> Tensor:
        nonlocal first
        with same_draws(seed, tensors), Observer() as observer:
            y = declared(dict(zip(subject.tensors, tensors, strict=True)))[_OUTPUT]
        first = first or observer.seen
        compare(OWNER, first, observer.seen)
        return y

    point = [t.detach().requires_grad_() for t in subject.tensors.values()]
    with torch.no_grad():
        error = (declare(*point) - learn(*point)).abs().max().item() if x.numel() else 0.0
    if not error <= _SAME_VALUE:
        raise GradcheckError(
            f"{OWNER}: the layer's output must be the sum of its slots' weights times their "
            f"experts' outputs, got a difference of {error:g}"
        )
    replaced: Callable[..., Tensor] = _Replaced.apply
    try:
        torch.autograd.gradcheck(
            lambda *tensors: replaced(declare, learn, *tensors), point, **tolerances
        )
    except GradcheckError as failure:
        expected = f"the derivative of {type(moe.estimator).__name__}'s surrogate"
        with suppress(UnstableSelectionError):
            result = sampled(declared, learner, subject, [_OUTPUT], seed, tolerances["eps"])
            if result.disagreements:
                raise GradcheckError(explanation(OWNER, result, expected)) from None
        inputs = ", ".join(f"{i} = {name}" for i, name in enumerate(subject.tensors))
        raise GradcheckError(
            f"{OWNER}: the gradient must be {expected}. {failure}\nInputs: {inputs}."
        ) from None


class _Layer(nn.Module):
    """The layer, returning what its estimator has a hand in."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor, token_mask: Tensor | None) -> Tensor:
        """The hidden states."""
        output: MoEOutput = self.moe(x, token_mask=token_mask)
        return output.hidden_states


class EstimatorSurrogate:
    """The formula of check_surrogate; what carries a bar there is taken from x at construction."""

    def __init__(self, moe: MoE, x: Tensor, token_mask: Tensor | None) -> None:
        with torch.no_grad():
            self.routing = moe(x, token_mask=token_mask).routing
            self.weights = self._weights(moe, self.routing.logits)  # [T, E]
            tokens = _counted(x, token_mask)
            ones = tokens.new_ones(len(tokens), 1)
            ids = [torch.full_like(ones, i, dtype=torch.int64) for i in range(moe.num_experts)]
            self.outputs = torch.stack([moe.experts(tokens, i, ones) for i in ids], dim=1)

    def __call__(self, moe: MoE, x: Tensor, token_mask: Tensor | None) -> Tensor:
        """The y of the formula, [T, H], of a layer that may have other parameters by now."""
        tokens = _counted(x, token_mask)
        y = moe.experts(tokens, self.routing.indices, self.routing.weights)
        logits = route(moe.router, tokens, moe.num_experts, token_mask=token_mask).logits
        weights = self._weights(moe, logits)
        assert weights is not None
        assert self.weights is not None
        moved = _counted(weights - self.weights, token_mask)
        y = moe.routed_scaling_factor * (y + (moved.unsqueeze(2) * self.outputs).sum(dim=1))
        if moe.shared_experts is not None:
            y = y + _counted(moe.shared_experts(tokens), token_mask)
        return y

    def _weights(self, moe: MoE, logits: Tensor) -> Tensor | None:
        weighed = before_drop(self.routing.selected, self.routing.indices)
        return moe.estimator.surrogate(logits, weighed, self.routing.indices)


def _counted(rows: Tensor, token_mask: Tensor | None) -> Tensor:
    """0 for tokens that do not count."""
    return rows if token_mask is None else rows.masked_fill(~token_mask.unsqueeze(1), 0)


class _Replaced(torch.autograd.Function):
    """A function with the gradient of another."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (torch's own)
        value: Callable[..., Tensor],
        learner: Callable[..., Tensor],
        *tensors: Tensor,
    ) -> Tensor:
        """value(*tensors)."""
        ctx.learner = learner
        ctx.save_for_backward(*tensors)
        return value(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """The gradient of learner(*tensors)."""
        tensors = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            y = ctx.learner(*tensors)
        grads = torch.autograd.grad(y, tensors, grad, allow_unused=True, materialize_grads=True)
        return None, None, *grads
