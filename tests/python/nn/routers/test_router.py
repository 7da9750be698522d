"""The router: initial values, noise, usage."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from torchmoe.nn import Gate, MoE, Router, Routing

H, E, T, K = 16, 5, 400, 2
F64 = torch.float64


def test_is_a_linear_map() -> None:
    router = Router(H, E, bias=True, dtype=F64)
    x = torch.randn(T, H, dtype=F64)
    assert_close(router(x), torch.nn.functional.linear(x, router.weight, router.bias))
    assert Router(H, E).bias is None


def test_initial_values_are_those_of_a_linear_layer() -> None:
    router = Router(H, 64, bias=True, usage_scaling=True)
    bound = 1 / math.sqrt(H)
    for parameter in router.parameters():
        assert parameter.abs().max() <= bound
        assert parameter.abs().max() > 0.8 * bound
        assert parameter.mean().abs() < 0.3 * bound
    assert (router.usage == 1 / 64).all()


def test_input_jitter_is_a_factor_near_1_for_each_entry() -> None:
    # With one-hot weights the logits are entries of x, so their ratio to x is the factor itself.
    router = Router(E, E, input_jitter=0.1)
    with torch.no_grad():
        router.weight.copy_(torch.eye(E))
    x = torch.rand(T, E) + 1
    factor = router(x) / x
    assert factor.min() >= 0.9 - 1e-6
    assert factor.max() <= 1.1 + 1e-6
    assert factor.min() < 0.91
    assert factor.max() > 1.09
    assert_close(factor.mean(), torch.tensor(1.0), rtol=0, atol=0.01)
    assert torch.equal(router.eval()(x), x)


def test_input_jitter_survives_bfloat16() -> None:
    # A factor rounded to bfloat16 could only be one of a few multiples of 1/256 here.
    router = Router(E, E, input_jitter=0.01, dtype=torch.bfloat16)
    with torch.no_grad():
        router.weight.copy_(torch.eye(E))
    logits = router(torch.ones(T, E, dtype=torch.bfloat16))
    assert logits.dtype == torch.float32
    assert logits.unique().numel() > T
    logits.sum().backward()
    assert router.weight.grad.dtype == torch.bfloat16


def test_logit_noise_is_gaussian() -> None:
    router = Router(H, E, logit_noise=0.5)
    x = torch.randn(T, H)
    noise = router(x) - router.eval()(x)
    # Standard errors of mean and deviation over T * E = 2000 draws: 0.011 and 0.008.
    assert noise.mean().abs() < 0.05
    assert abs(noise.std().item() - 0.5) < 0.04
    assert (noise.abs() < 0.5).float().mean().sub(0.683).abs() < 0.05


def test_noise_is_off_by_default_and_comes_from_the_default_generator() -> None:
    x = torch.randn(T, H)
    before = torch.get_rng_state()
    plain = Router(H, E)
    drawn = torch.get_rng_state()
    assert torch.equal(plain(x), plain(x))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not torch.equal(before, drawn)
    noisy = Router(H, E, input_jitter=0.1, logit_noise=0.1)
    seen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seen.append(noisy(x))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_noise_may_change() -> None:
    router, x = Router(H, E), torch.randn(T, H)
    assert router.input_jitter == router.logit_noise == 0.0
    plain = router(x)
    router.logit_noise = 0.1
    assert not torch.equal(router(x), plain)
    router.logit_noise, router.input_jitter = 0.0, 0.1
    assert not torch.equal(router(x), plain)
    router.input_jitter = 0.0
    assert torch.equal(router(x), plain)
    with pytest.raises(ValueError, match=r"Router: logit_noise must be .*, got nan"):
        router.logit_noise = math.nan


def test_the_experts_see_the_input_without_jitter() -> None:
    seen = []

    def experts(x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x * weights.sum(1, keepdim=True)

    x = torch.randn(T, H)
    MoE(H, None, E, K, router=Router(H, E, input_jitter=0.1), experts=experts)(x)
    assert torch.equal(seen[0], x)


def test_usage_scales_the_gradient_of_each_row() -> None:
    plain, scaled = Router(H, E, dtype=F64), Router(H, E, usage_scaling=True, dtype=F64)
    with torch.no_grad():
        scaled.weight.copy_(plain.weight)
        scaled.usage.copy_(torch.tensor([0.5, 0.2, 0.3, 0.0, 0.0]))
    x = torch.randn(T, H, dtype=F64, requires_grad=True)
    direction = torch.randn(T, E, dtype=F64)
    seen = []
    for router in (plain, scaled):
        x.grad = None
        logits = router(x)
        (logits * direction).sum().backward()
        seen.append((logits, x.grad, router.weight.grad))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])
    assert_close(seen[1][2], (1 - scaled.usage).unsqueeze(1) * seen[0][2])


def make(**options: object) -> MoE:
    return MoE(H, 4, E, K, router=Router(H, E, usage_scaling=True, **options), **options)


def routing_of(moe: MoE, num_tokens: int, mask: torch.Tensor | None = None) -> Routing:
    x = torch.randn(num_tokens, H, dtype=moe.router.weight.dtype)
    return moe(x, token_mask=mask).routing


def test_usage_is_a_running_average_that_sums_to_1() -> None:
    moe = make(dtype=F64)
    usage = torch.full((E,), 1 / E, dtype=F64)
    for _ in range(5):
        routing = routing_of(moe, 7)
        moe.update(routing)
        usage = 0.99 * usage + 0.01 * routing.tokens_per_expert.double() / (K * 7)
        assert_close(moe.router.usage, usage)
        assert_close(moe.router.usage.sum(), torch.tensor(1.0, dtype=F64))
    assert moe.router.usage.grad_fn is None
    moe.router.usage_decay = 0.0
    moe.update(routing)
    assert_close(moe.router.usage, routing.tokens_per_expert.double() / (K * 7))


def test_usage_counts_only_the_tokens_that_count() -> None:
    moe = make()
    moe.router.usage_decay = 0.0
    mask = torch.tensor([True, False, True, True, False])
    routings = [routing_of(moe, 5, mask), routing_of(moe, 9)]
    moe.update(routings)
    counts = sum(routing.tokens_per_expert for routing in routings)
    assert counts.sum() == K * 12
    assert_close(moe.router.usage, counts / (K * 12))


def test_usage_stays_when_no_token_was_counted() -> None:
    moe = make()
    moe.update(routing_of(moe, 5))
    before = moe.router.usage.clone()
    moe.update(routing_of(moe, 5, torch.zeros(5, dtype=torch.bool)))
    moe.update(routing_of(moe, 0))
    assert torch.equal(moe.router.usage, before)


def test_update_without_anything_to_remember_does_nothing() -> None:
    moe = MoE(H, 4, E, K, gate=Gate(estimator="straight_through"))
    moe.update(moe(torch.randn(T, H)).routing)
    assert not dict(moe.named_buffers())
    moe.router.update(torch.ones(E, dtype=torch.int64), torch.tensor(E))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, r"Router: hidden_size must be >= 1, got 0"),
        ({"num_experts": 0}, r"Router: num_experts must be >= 1, got 0"),
        ({"input_jitter": -0.1}, r"Router: input_jitter must be a finite number >= 0, got -0.1"),
        ({"logit_noise": math.inf}, r"Router: logit_noise must be a finite number >= 0, got inf"),
    ],
)
def test_errors(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Router(**({"hidden_size": H, "num_experts": E} | options))
