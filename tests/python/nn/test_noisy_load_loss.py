"""load_loss in a layer with a noisy router: by its formula, with the logits before the noise."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from balanced import F64, INNER, B, E, H, K, S, T, gradient_of, make
from torchmoe import losses
from torchmoe.losses import LossInputs
from torchmoe.nn import (
    Balance,
    ContextRouter,
    ExpertChoiceRouter,
    MoE,
    Router,
    RouterOutput,
    SequenceRouter,
)

NOISE = 0.5


def noisy_router(**options: Any) -> Router:
    return Router(H, E, logit_noise=NOISE, dtype=F64, **options)


def noisy_layer(router: nn.Module | None = None, **options: Any) -> MoE:
    router = noisy_router() if router is None else router
    return make(router=router, balance=Balance(losses=[("load_loss", 0.5)]), **options)


def by_formula(clean: Tensor, noisy: Tensor, deviation: float, top_k: int = K) -> Tensor:
    """Equations 8 to 11 of arXiv 1701.06538, one token and expert at a time."""
    load = [clean.new_zeros(()) for _ in range(E)]
    for c, z in zip(clean, noisy, strict=True):
        for i in range(E):
            others = torch.cat([z[:i], z[i + 1 :]])
            threshold = others.sort(descending=True).values[top_k - 1]
            load[i] = load[i] + (1 + torch.erf((c[i] - threshold) / deviation / math.sqrt(2))) / 2
    loads = torch.stack(load)
    return loads.var(correction=0) / loads.mean().square()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("jitter", [0.0, 0.1])
def test_the_term_and_its_gradient(jitter: float, masked: bool) -> None:
    moe = noisy_layer(noisy_router(input_jitter=jitter))
    x = torch.randn(T, H, dtype=F64)
    mask = torch.rand(T) > 0.3 if masked else torch.ones(T, dtype=torch.bool)
    torch.manual_seed(3)
    output = moe(x, token_mask=mask if masked else None)
    routing = output.routing
    # The draws of the pass: the noise comes after the factors of the input.
    torch.manual_seed(3)
    seen = x.masked_fill(~mask[:, None], 0)
    if jitter:
        seen = seen * torch.empty_like(x).uniform_(1 - jitter, 1 + jitter)
    clean = seen @ moe.router.weight.t()
    noisy = clean + NOISE * torch.randn(T, E, dtype=F64)
    assert_close(routing.logits, noisy)
    expected = by_formula(clean[mask], noisy[mask], NOISE)
    found = routing.losses["load_loss"]
    assert_close(found, expected)
    assert_close(gradient_of(found, moe), gradient_of(expected, moe))
    assert_close(output.aux_loss, 0.01 * routing.losses["load_balancing_loss"] + 0.5 * expected)
    # What it is not: the noisy logits in both places.
    wrong = by_formula(noisy[mask], noisy[mask], 1 / E)
    assert (found - wrong).abs() > 0.1 * found


def test_without_noise_it_is_as_of_the_logits_alone() -> None:
    x = torch.randn(T, H, dtype=F64)
    for moe in (noisy_layer().eval(), noisy_layer(Router(H, E, dtype=F64))):
        routing = moe(x).routing
        expected = by_formula(routing.logits, routing.logits, 1 / E)
        assert_close(routing.losses["load_loss"], expected)
        assert torch.equal(routing.losses["load_loss"], losses.load_loss(routing.logits, K))


def test_the_same_draws_and_numbers_with_and_without_the_term() -> None:
    one, other = noisy_layer(), make(router=noisy_router())
    other.load_state_dict(one.state_dict())
    x = torch.randn(T, H, dtype=F64)
    seen = []
    for moe in (one, other):
        torch.manual_seed(7)
        output = moe(x)
        seen.append([output.hidden_states, output.routing.logits, output.routing.indices])
        seen[-1].append(torch.rand(3))
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)


# ---- what a custom loss gets


class Collected:
    def __init__(self) -> None:
        self.given: list[LossInputs] = []

    def __call__(self, given: LossInputs) -> Tensor:
        self.given.append(given)
        return given.clean_logits.square().mean()

    __name__ = "collected"


@pytest.mark.parametrize("training", [True, False])
def test_a_loss_of_ones_own_finds_both(training: bool) -> None:
    collected = Collected()
    moe = make(router=noisy_router(), balance=Balance(losses=[(collected, 1.0)])).train(training)
    x = torch.randn(B, S, H, dtype=F64)
    routing = moe(x).routing
    [given] = collected.given
    assert given.logits is routing.logits
    assert given.noise_deviation == (NOISE if training else None)
    clean = x.view(T, H) @ moe.router.weight.t()
    assert_close(given.clean_logits, clean)
    assert (given.clean_logits is given.logits) is not training
    found = routing.losses["collected"]
    assert_close(gradient_of(found, moe), gradient_of(clean.square().mean(), moe))


def test_a_router_that_is_called_gives_logits() -> None:
    router, x = noisy_router(), torch.randn(T, H, dtype=F64)
    torch.manual_seed(1)
    noisy = router(x)
    torch.manual_seed(1)
    output = router(x, as_output=True)
    assert torch.equal(noisy, output.logits)
    assert output.noise_deviation == NOISE
    assert torch.equal(output.clean_logits, router.eval()(x))
    assert router(x, as_output=True)[1:] == (None,) * 4
    assert torch.equal(router(x, as_output=True).logits, output.clean_logits)


class Doubled(Router):
    """Of the user's own, with a forward that takes x alone."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Telling(Router):
    """Of the user's own, which tells its noise."""

    @property
    def tells_noise(self) -> bool:
        return self.training

    def forward(self, x: Tensor, *, as_output: bool = False) -> Tensor | RouterOutput:
        output = super().forward(x, as_output=True)
        doubled = RouterOutput(
            2 * output.logits,
            clean_logits=2 * output.clean_logits,
            noise_deviation=2 * output.noise_deviation,
        )
        return doubled if as_output else doubled.logits


def test_subclasses_of_the_router() -> None:
    x = torch.randn(T, H, dtype=F64)
    routing = noisy_layer(Doubled(H, E, logit_noise=NOISE, dtype=F64))(x).routing
    assert torch.equal(routing.losses["load_loss"], losses.load_loss(routing.logits, K))
    moe = noisy_layer(Telling(H, E, logit_noise=NOISE, dtype=F64))
    routing = moe(x).routing
    clean = 2 * x @ moe.router.weight.t()
    assert_close(routing.losses["load_loss"], by_formula(clean, routing.logits, 2 * NOISE))


# ---- routers around it, and custom ones


@pytest.mark.parametrize(
    "around",
    [
        SequenceRouter,
        lambda router: SequenceRouter(router, pooling="first"),
        lambda router: ExpertChoiceRouter(router, K),
        lambda router: ExpertChoiceRouter(router, K, among="sequence"),
    ],
)
def test_routers_around_a_noisy_one(around: Callable[[Router], ContextRouter]) -> None:
    moe = noisy_layer(around(noisy_router()))
    collected = Collected()
    moe.balance = replace(moe.balance, losses=[*moe.balance.losses, (collected, 0.0)])
    x = torch.randn(B, S, H, dtype=F64)
    routing = moe(x).routing
    [given] = collected.given
    assert given.noise_deviation == NOISE
    read = routing.details.get("gate_input", x)
    clean = read @ moe.router.router.weight.t()
    if read.dim() < 3:
        clean = clean.unsqueeze(1).expand(B, S, E)
    clean = clean.reshape(T, E)
    assert_close(given.clean_logits, clean)
    assert (routing.logits - clean).abs().max() > 0.1
    expected = by_formula(clean, routing.logits, NOISE)
    assert_close(routing.losses["load_loss"], expected)
    of = [moe.router.router.weight]
    [found] = torch.autograd.grad(routing.losses["load_loss"], of, retain_graph=True)
    [right] = torch.autograd.grad(expected, of)
    assert_close(found, right)


class Shifted(ContextRouter):
    """Of the user's own, in float32 or narrower."""

    def __init__(self, deviation: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_experts = E
        self.clean = torch.randn(B, S, E, dtype=dtype)
        self.noisy = self.clean + torch.randn(B, S, E, dtype=dtype)
        self.deviation = deviation

    def forward(self, x: Tensor, router_input: Any = None, token_mask: Any = None) -> RouterOutput:
        return RouterOutput(self.noisy, clean_logits=self.clean, noise_deviation=self.deviation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("deviation", [None, 0.7, 2])
def test_a_context_router_of_ones_own(deviation: float | None, dtype: torch.dtype) -> None:
    router = Shifted(deviation, dtype)
    routing = noisy_layer(router)(torch.randn(B, S, H, dtype=F64)).routing
    clean, noisy = (
        z.view(T, E).to(torch.promote_types(dtype, torch.float32))
        for z in (router.clean, router.noisy)
    )
    assert_close(routing.losses["load_loss"], by_formula(clean, noisy, deviation or 1 / E))
    assert routing.losses["load_loss"].dtype == clean.dtype


@pytest.mark.parametrize(
    ("clean", "got"),
    [
        (torch.zeros(B, S, E - 1), rf"shape \[{B}, {S}, {E - 1}\]"),
        (torch.zeros(T, E), rf"shape \[{T}, {E}\]"),
        ([0.0], "list"),
    ],
)
def test_clean_logits_of_another_shape_are_refused(clean: object, got: str) -> None:
    router = Shifted(None, F64)
    router.clean = clean
    message = (
        r"^MoE: router must return clean_logits in the shape of logits "
        rf"\[{B}, {S}, {E}\] or None, got {got}$"
    )
    with pytest.raises(RuntimeError, match=message):
        noisy_layer(router)(torch.randn(B, S, H, dtype=F64))


@pytest.mark.parametrize("deviation", [0.0, -1.0, math.nan, math.inf, True, "0.5"])
def test_a_deviation_that_is_none_is_refused(deviation: object) -> None:
    message = "^MoE: router must return noise_deviation, a finite number > 0 or None, got "
    with pytest.raises(ValueError, match=message):
        noisy_layer(Shifted(deviation, F64))(torch.randn(B, S, H, dtype=F64))


# ---- compiled, recomputed, copied


@pytest.mark.parametrize("dynamic", [False, True, None])
def test_compiled_without_a_break(dynamic: bool | None) -> None:
    moe = noisy_layer()
    collected: list[Tensor] = []

    counter = CompileCounterWithBackend("aot_eager")

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        output = moe(x)
        return output.routing.losses["load_loss"], output.routing.logits

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=dynamic)
    for tokens in (T, T, 11):
        torch.manual_seed(2)
        x = torch.randn(tokens, H, dtype=F64)
        found, noisy = compiled(x)
        clean = x @ moe.router.weight.t()
        expected = by_formula(clean, noisy.detach() - clean.detach() + clean, NOISE)
        assert_close(found, expected)
        [gradient] = torch.autograd.grad(found, [moe.router.weight])
        assert_close(gradient, gradient_of(expected, moe))
        collected.append(noisy)
    assert torch.equal(collected[0], collected[1])
    assert counter.frame_count <= 2


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed(use_reentrant: bool) -> None:
    moe = noisy_layer()
    x = torch.randn(T, H, dtype=F64, requires_grad=True)

    def term(x: Tensor) -> Tensor:
        return moe(x).routing.losses["load_loss"]

    seen = []
    for function in (term, lambda x: checkpoint(term, x, use_reentrant=use_reentrant)):
        moe.zero_grad()
        x.grad = None
        torch.manual_seed(4)
        value = function(x)
        value.backward()
        seen.append([value, x.grad, moe.router.weight.grad])
    for plain, again in zip(*seen, strict=True):
        assert torch.equal(plain, again)


def test_a_router_that_is_compiled_alone_and_copies() -> None:
    x = torch.randn(T, H, dtype=F64)
    moe = noisy_layer()
    others = [copy.deepcopy(moe) for _ in range(2)]
    others[1].router = torch.compile(others[1].router, backend="aot_eager")
    seen = []
    for layer in (moe, *others):
        torch.manual_seed(6)
        seen.append(layer(x).routing.losses["load_loss"])
    assert torch.equal(seen[0], seen[1])
    assert_close(seen[0], seen[2])


def test_bfloat16() -> None:
    moe = MoE(
        H,
        INNER,
        E,
        K,
        router=Router(H, E, logit_noise=NOISE),
        balance=Balance(losses=[("load_loss", 0.5)]),
    ).bfloat16()
    routing = moe(torch.randn(T, H, dtype=torch.bfloat16)).routing
    assert routing.losses["load_loss"].dtype == torch.float32
    (gradient,) = torch.autograd.grad(routing.losses["load_loss"], [moe.router.weight])
    assert gradient.isfinite().all()
    assert (gradient != 0).any()
