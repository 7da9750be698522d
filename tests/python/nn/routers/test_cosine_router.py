"""Experts as directions: the formula, its scale invariance, the temperature, matches, usage."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from torchmoe.nn import CosineRouter, MoE
from torchmoe.testing import gradcheck

H, E, G, K, T = 6, 5, 3, 2, 23
F64 = torch.float64
EPS = torch.finfo(torch.float32).eps


def make(**options: Any) -> CosineRouter:
    return CosineRouter(H, E, **({"projection_size": G, "dtype": F64} | options))


def plain_cosine(one: list[float], other: list[float]) -> float:
    lengths = math.sqrt(sum(a * a for a in one)) * math.sqrt(sum(b * b for b in other))
    return sum(a * b for a, b in zip(one, other, strict=True)) / lengths if lengths else 0.0


def plain_cosines(router: CosineRouter, x: Tensor) -> Tensor:
    """Cosines [T, E] of the projected tokens and the embeddings, one after another."""
    projection, embeddings = router.projection.tolist(), router.embeddings.tolist()
    rows = []
    for token in x.tolist():
        projected = [sum(p * v for p, v in zip(row, token, strict=True)) for row in projection]
        rows.append([plain_cosine(projected, embedding) for embedding in embeddings])
    return torch.tensor(rows, dtype=F64)


@pytest.mark.parametrize("temperature", [0.07, 0.3, 2.0])
def test_logits_are_cosines_over_the_temperature(temperature: float) -> None:
    router = make(temperature=temperature)
    x = torch.randn(T, H, dtype=F64)
    assert_close(router(x), plain_cosines(router, x) / temperature)
    assert router(x).abs().max() <= (1 + 1e-12) / temperature


def test_parts_multiply_to_the_logits() -> None:
    router = make()
    x = torch.randn(T, H, dtype=F64)
    ones = torch.ones(T, dtype=F64)
    assert_close(router.project(x).norm(dim=1), ones)
    assert_close(router.directions.norm(dim=1), ones[:E])
    assert_close(router.rows * router.temperature, router.directions)
    assert_close(router.project(x) @ router.rows.T, router(x))


def test_the_length_of_tokens_does_not_matter() -> None:
    router = make()
    x = torch.randn(T, H, dtype=F64)
    lengths = torch.logspace(-6, 6, T, dtype=F64).unsqueeze(1)
    assert_close(router(lengths * x), router(x), rtol=0, atol=1e-13)
    # Without a change of the result along x, the gradient has no part along x.
    leaf = x.clone().requires_grad_()
    (router(leaf) * torch.randn(T, E, dtype=F64)).sum().backward()
    assert leaf.grad.abs().max() > 0.1
    assert_close((leaf.grad * x).sum(1), torch.zeros(T, dtype=F64), rtol=0, atol=1e-12)


def test_the_length_of_embeddings_does_not_matter() -> None:
    router = make()
    x = torch.randn(T, H, dtype=F64)
    expected = router(x)
    (expected * torch.randn(T, E, dtype=F64)).sum().backward()
    along = (router.embeddings.grad * router.embeddings).sum(1)
    assert_close(along, torch.zeros(E, dtype=F64), rtol=0, atol=1e-12)
    with torch.no_grad():
        router.embeddings.mul_(torch.logspace(-3, 3, E, dtype=F64).unsqueeze(1))
        router.projection.mul_(100)
    assert_close(router(x), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_a_token_of_zeros_has_logits_0_and_finite_gradients(dtype: torch.dtype) -> None:
    router = make(dtype=dtype)
    x = torch.randn(T, H, dtype=dtype)
    x[3] = 0
    x.requires_grad_()
    logits = router(x)
    assert (logits[3] == 0).all()
    assert (logits[[2, 4]] != 0).all()
    (logits * torch.randn(T, E)).sum().backward()
    for tensor in (x, *router.parameters()):
        assert tensor.grad.isfinite().all()


def test_an_embedding_of_zeros_matches_nothing() -> None:
    router = make()
    with torch.no_grad():
        router.embeddings[1] = 0
    x = torch.randn(T, H, dtype=F64, requires_grad=True)
    logits = router(x)
    assert (logits[:, 1] == 0).all()
    logits.square().sum().backward()
    for tensor in (x, *router.parameters()):
        assert tensor.grad.isfinite().all()


def test_the_first_temperature() -> None:
    assert_close(make().temperature, torch.tensor(0.3, dtype=F64))
    assert_close(make(temperature=0.07).temperature, torch.tensor(0.07, dtype=F64))
    assert make().temperature.shape == ()
    assert make(dtype=torch.bfloat16).temperature.dtype == torch.float32


def test_the_temperature_stays_above_its_least() -> None:
    router = make(min_temperature=0.05)
    x = torch.randn(T, H, dtype=F64)
    direction = torch.randn(T, E, dtype=F64)
    expected = plain_cosines(router, x)
    (router(x) * direction).sum().backward()
    assert router.log_temperature.grad.abs() > 1e-3
    for below in (0.049, 1e-30):
        router.zero_grad()
        with torch.no_grad():
            router.log_temperature.fill_(math.log(below))
        logits = router(x)
        assert_close(logits, expected / 0.05)
        (logits * direction).sum().backward()
        assert router.log_temperature.grad == 0
        assert router.embeddings.grad.abs().max() > 0


def test_the_gradient_of_the_temperature() -> None:
    # logits = cosines exp(-log tau), whose derivative is -logits.
    router = make()
    x = torch.randn(T, H, dtype=F64)
    direction = torch.randn(T, E, dtype=F64)
    logits = router(x)
    (logits * direction).sum().backward()
    assert_close(router.log_temperature.grad[0], -(logits.detach() * direction).sum())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_match_percentages(dtype: torch.dtype, training: bool) -> None:
    router = CosineRouter(3, 4, projection_size=3, usage_scaling=True, dtype=dtype).train(training)
    with torch.no_grad():
        router.projection.copy_(torch.eye(3))
        router.embeddings.copy_(
            torch.tensor([[1.0, 2.0, 3.0], [-2.0, -4.0, -6.0], [3.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
        )
        router.log_temperature.fill_(2.0)
    matches = router.match_percentages(torch.tensor([[0.25, 0.5, 0.75]], dtype=dtype))
    assert matches.dtype == (F64 if dtype == F64 else torch.float32)
    assert not matches.requires_grad
    # Two directions of three numbers, each with a few roundings.
    expected = torch.tensor([[100.0, 0.0, 50.0, 50.0]], dtype=matches.dtype)
    assert_close(matches, expected, rtol=0, atol=50 * 8 * EPS)


def test_match_percentages_are_within_0_and_100() -> None:
    # Rounding takes a cosine of a direction with itself above 1 now and then.
    router = CosineRouter(G, T, projection_size=G)
    with torch.no_grad():
        router.projection.copy_(torch.eye(G))
        for x in (router.embeddings.clone(), -router.embeddings):
            matches = router.match_percentages(x)
            assert matches.min() >= 0
            assert matches.max() <= 100
    assert_close(router.match_percentages(x).diagonal(), torch.zeros(T), rtol=0, atol=400 * EPS)
    x = torch.randn(T, G)
    expected = 50 * (1 + plain_cosines(router, x)).float()
    assert_close(router.match_percentages(x), expected, rtol=0, atol=400 * EPS)


def test_usage_scales_the_gradient_of_each_embedding() -> None:
    plain, scaled = make(), make(usage_scaling=True)
    scaled.load_state_dict(plain.state_dict(), strict=False)
    scaled.usage.copy_(torch.tensor([0.5, 0.2, 0.3, 0.0, 0.0]))
    x = torch.randn(T, H, dtype=F64)
    direction = torch.randn(T, E, dtype=F64)
    for router in (plain, scaled):
        (router(x) * direction).sum().backward()
    assert torch.equal(plain(x), scaled(x))
    expected = (1 - scaled.usage).unsqueeze(1) * plain.embeddings.grad
    assert_close(scaled.embeddings.grad, expected)
    assert torch.equal(scaled.projection.grad, plain.projection.grad)
    assert torch.equal(scaled.log_temperature.grad, plain.log_temperature.grad)


@pytest.mark.parametrize("option", ["usage_scaling", "track_usage"])
def test_usage_follows_the_shares(option: str) -> None:
    moe = MoE(H, 4, E, K, router=make(**{option: True}), dtype=F64)
    assert (moe.router.usage == 1 / E).all()
    usage = torch.full((E,), 1 / E, dtype=F64)
    for _ in range(3):
        routing = moe(torch.randn(T, H, dtype=F64)).routing
        moe.update(routing)
        usage = 0.99 * usage + 0.01 * routing.tokens_per_expert.double() / (K * T)
        assert_close(moe.router.usage, usage)
    assert (usage != 1 / E).any()
    assert make(**{option: True}, dtype=torch.bfloat16).usage.dtype == torch.float32
    kept = moe.router.usage.clone()
    assert torch.equal(moe.bfloat16().router.usage, kept)
    moe.router.reset_parameters()
    assert (moe.router.usage == 1 / E).all()


def test_without_usage_there_is_none() -> None:
    router = make()
    assert router.usage is None
    assert not dict(router.named_buffers())
    router.update(torch.ones(E, dtype=torch.int64), torch.tensor(E))
    tracked = make(track_usage=True)
    tracked.load_state_dict(router.state_dict() | {"usage": tracked.usage})
    for each in (router, tracked):
        each(torch.ones(1, H, dtype=F64)).square().sum().backward()
    assert torch.equal(tracked.embeddings.grad, router.embeddings.grad)


@pytest.mark.parametrize(("num_experts", "size"), [(1, 2), (4, 2), (5, 2), (6, 3), (64, 32)])
def test_the_projection_is_half_as_large_as_the_experts_are_many(
    num_experts: int, size: int
) -> None:
    router = CosineRouter(H, num_experts)
    assert router.projection_size == size
    assert router.projection.shape == (size, H)
    assert router.embeddings.shape == (num_experts, size)
    assert router.log_temperature.shape == (1,)
    assert router.temperature.shape == ()


def test_initial_values() -> None:
    router = CosineRouter(64, 100, projection_size=50, temperature=0.2)
    assert router.projection.abs().max() <= 1 / 8
    assert router.projection.abs().max() > 0.99 / 8
    # Standard errors over 5000 draws of a normal variable: 0.014 and 0.01.
    assert router.embeddings.mean().abs() < 0.06
    assert (router.embeddings.std() - 1).abs() < 0.04
    before = copy.deepcopy(router.state_dict())
    router.reset_parameters()
    assert not torch.equal(router.embeddings, before["embeddings"])
    assert torch.equal(router.log_temperature, before["log_temperature"])


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("prefix", ["", "router."])
def test_a_temperature_without_a_dimension_still_loads(prefix: str, assign: bool) -> None:
    tuned = make()
    with torch.no_grad():
        tuned.log_temperature.fill_(-0.5)
    module = nn.ModuleDict({"router": make()}) if prefix else make()
    state = {prefix + name: tensor for name, tensor in tuned.state_dict().items()}
    old = state | {f"{prefix}log_temperature": torch.tensor(-0.5, dtype=F64)}
    # A snapshot that keeps its graph is a state dict too.
    for given in (old, {name: nn.Parameter(tensor) for name, tensor in old.items()}):
        module.load_state_dict(given, strict=True, assign=assign)
        assert given[f"{prefix}log_temperature"].shape == ()
        (parameter,) = (p for n, p in module.named_parameters() if n.endswith("log_temperature"))
        assert isinstance(parameter, nn.Parameter)
        assert parameter.is_leaf
        assert parameter.requires_grad
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, state[name])


def test_derivatives() -> None:
    router = make()
    x = torch.randn(4, H, dtype=F64)
    assert gradcheck(router, x)
    assert gradcheck(MoE(H, 2, E, K, router=router, dtype=F64), x)


def test_second_derivatives() -> None:
    router = CosineRouter(3, 3, projection_size=2, dtype=F64)
    names = [name for name, _ in router.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(router, dict(zip(names, parameters, strict=True)), x)

    x = torch.randn(2, 3, dtype=F64)
    leaves = [t.detach().requires_grad_() for t in (x, *router.parameters())]
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_parameters_give_wide_logits(dtype: torch.dtype) -> None:
    router = make(dtype=dtype)
    x = torch.randn(T, H, dtype=dtype)
    logits = router(x)
    assert logits.dtype == torch.float32
    expected = plain_cosines(router, x) / router.log_temperature.double().exp()
    # H products, then G of them over two lengths of as many, and the division: in float32.
    atol = (2 * H + 6 * G) * EPS * expected.abs().max().item()
    assert_close(logits, expected.float(), rtol=0, atol=atol)


def test_extra_repr() -> None:
    sizes = "hidden_size=6, num_experts=5, projection_size=3, min_temperature=0.01"
    assert make().extra_repr() == sizes
    assert make(usage_scaling=True).extra_repr() == sizes + ", usage_scaling=True"
    assert make(track_usage=True).extra_repr() == sizes + ", track_usage=True"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, r"CosineRouter: hidden_size must be >= 1, got 0"),
        ({"num_experts": 0}, r"CosineRouter: num_experts must be >= 1, got 0"),
        ({"projection_size": 0}, r"CosineRouter: projection_size must be >= 1, got 0"),
        (
            {"temperature": 0.001},
            r"CosineRouter: temperature must be at least min_temperature 0.01, got 0.001",
        ),
        ({"temperature": math.inf}, r"temperature must be a finite number > 0, got inf"),
        ({"temperature": math.nan}, r"temperature must be a finite number > 0, got nan"),
        ({"min_temperature": 0.0}, r"min_temperature must be a finite number > 0, got 0.0"),
    ],
)
def test_errors(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CosineRouter(**({"hidden_size": H, "num_experts": E} | options))


def test_sizes_are_integers() -> None:
    with pytest.raises(TypeError, match=r"CosineRouter: projection_size must be an int.*, got 2.5"):
        CosineRouter(H, E, projection_size=2.5)
