"""What a layer's parts return is looked at: a wrong shape is never made to fit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchmoe.nn import (
    Balance,
    Estimator,
    Exact,
    ExpertCommunication,
    ExpertList,
    Experts,
    Gate,
    MoE,
    known_estimators,
)
from torchmoe.nn.estimators import registry

T, H, INNER, E, K = 6, 4, 3, 4, 2
META = torch.zeros(T, K, device="meta")

# What is made of an expert's output y [T, H], the error and what it has got.
WRONG: list[tuple[Callable[[Tensor], Any], type[Exception], str]] = [
    (lambda y: y.t(), RuntimeError, r"shape \[4, 6\]"),
    (lambda y: y[:, :-1], RuntimeError, r"shape \[6, 3\]"),
    (lambda y: y[None], RuntimeError, r"shape \[1, 6, 4\]"),
    (lambda y: y.long(), RuntimeError, "torch.int64"),
    (lambda y: (y, y), TypeError, "tuple"),
    (lambda y: None, TypeError, "None"),
    (lambda y: y.to("meta"), RuntimeError, "one on meta"),
]


def altered(change: Callable[[Tensor], Any]) -> Callable[..., Any]:
    experts = Experts(H, INNER, E)
    return lambda x, indices, weights: change(experts(x, indices, weights))


@pytest.mark.parametrize(("change", "error", "got"), WRONG)
def test_experts(change: Callable[[Tensor], Any], error: type[Exception], got: str) -> None:
    moe = MoE(H, None, E, K, experts=altered(change))
    with pytest.raises(error, match=rf"^MoE: experts must return .*, got {got}$"):
        moe(torch.randn(T, H))


@pytest.mark.parametrize("estimator", known_estimators())
def test_experts_under_every_estimator(estimator: str) -> None:
    moe = MoE(H, None, E, K, experts=altered(lambda y: (y, y)), gate=Gate(estimator=estimator))
    with pytest.raises(TypeError, match=r"^MoE: experts must return a tensor .*, got tuple$"):
        moe(torch.randn(T, H))


def test_a_square_that_is_transposed_is_what_it_says() -> None:
    """T = H leaves nothing to see; every other number of tokens is refused."""
    moe = MoE(H, None, E, K, experts=altered(Tensor.t))
    assert moe(torch.randn(H, H)).hidden_states.shape == (H, H)
    with pytest.raises(RuntimeError, match=r"= \[5, 4\], got shape \[4, 5\]$"):
        moe(torch.randn(5, H))


@pytest.mark.parametrize(("change", "error", "got"), WRONG)
def test_shared_experts(change: Callable[[Tensor], Any], error: type[Exception], got: str) -> None:
    class Shared(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return change(x)

    moe = MoE(H, INNER, E, K, shared_experts=Shared())
    with pytest.raises(error, match=rf"^MoE: shared_experts must return .*, got {got}$"):
        moe(torch.randn(T, H))


@pytest.mark.parametrize(("change", "error", "got"), WRONG[3:])
def test_the_experts_of_a_list(
    change: Callable[[Tensor], Any], error: type[Exception], got: str
) -> None:
    class Expert(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return change(x)

    moe = MoE(H, None, 1, 1, experts=ExpertList([Expert()]))
    with pytest.raises(error, match=rf"^ExpertList: modules must return .*, got {got}$"):
        moe(torch.randn(T, H))


@pytest.mark.parametrize(("change", "error", "got"), WRONG[3:])
def test_experts_that_talk(
    change: Callable[[Tensor], Any], error: type[Exception], got: str
) -> None:
    moe = MoE(H, None, E, K, experts=ExpertCommunication(altered(change), H, E))
    with pytest.raises(error, match=rf"^ExpertCommunication: experts must return .*, got {got}$"):
        moe(torch.randn(T, H))


@pytest.mark.parametrize(
    ("term", "error", "got"),
    [
        (lambda given: given.logits, RuntimeError, r"shape \[6, 4\]"),
        (lambda given: given.indices.sum(), RuntimeError, "torch.int64"),
        (lambda given: 1.0, TypeError, "1.0"),
        (lambda given: given.logits.sum().to("meta"), RuntimeError, "one on meta"),
    ],
)
def test_terms_of_the_loss(term: Any, error: type[Exception], got: str) -> None:
    term.__name__ = "mine"
    moe = MoE(H, INNER, E, K, balance=Balance(losses=[(term, 0.1)]))
    message = rf'^MoE: the term "mine" of balance.losses must return .*, got {got}$'
    with pytest.raises(error, match=message):
        moe(torch.randn(T, H))


@pytest.mark.parametrize(
    ("method", "result", "error", "message"),
    [
        ("select", torch.zeros(T, K), RuntimeError, r"select must return int64 .*float32"),
        ("select", torch.zeros(T, K + 1).long(), RuntimeError, r"select must .* \[6, 3\]"),
        ("select", None, TypeError, r"select must return a tensor, got None"),
        ("select", META.long(), RuntimeError, r"select must return .* cpu, got one on meta"),
        ("weigh", META, RuntimeError, r"weigh must return .* cpu, got one on meta"),
        ("weigh", torch.zeros(K, T), RuntimeError, r"weigh must return .*got shape \[2, 6\]"),
        ("weigh", None, TypeError, r"weigh must return .*, got None"),
        ("combine", torch.zeros(H, T), RuntimeError, r"combine must return .*, got shape \[4, 6\]"),
        ("combine", None, TypeError, r"combine must return .*, got None"),
    ],
)
def test_an_estimator_of_one_s_own(
    method: str, result: Tensor | None, error: type[Exception], message: str
) -> None:
    estimator: Estimator = type("Mine", (Exact,), {method: lambda self, *a, **k: result})()
    moe = MoE(H, INNER, E, K, gate=Gate(estimator=estimator))
    with pytest.raises(error, match=rf"^MoE: gate\.estimator\.{message}"):
        moe(torch.randn(T, H))


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (nn.ModuleList([nn.Linear(H, H)]), r"as an ExpertList of the modules is, got ModuleList"),
        ([nn.Linear(H, H)], r"as an ExpertList of the modules is, got list"),
        (nn.Linear(H, H), r"as an ExpertList of modules is, got Linear"),
        (nn.Sequential(nn.Linear(H, H)), r"as an ExpertList of modules is, got Sequential"),
        (lambda x: x, r"must be called as experts\(x, indices, weights\), got function"),
        (Experts, r"got the class Experts"),
        (nn.Module(), r"must be a module with a forward, got Module"),
        ("x", r"got 'x'"),
    ],
)
def test_what_are_no_experts(experts: Any, message: str) -> None:
    for make in (
        lambda: MoE(H, None, 1, 1, experts=experts),
        lambda: ExpertCommunication(experts, H, 1),
    ):
        with pytest.raises(TypeError, match=rf"^(MoE|ExpertCommunication): experts .*{message}$"):
            make()


@pytest.mark.parametrize(
    "experts",
    [
        lambda x, indices, weights: x,
        lambda x, *slots: x,
        lambda x, indices, weights, scale=1.0: x,
        functools.partial(lambda scale, x, indices, weights: scale * x, 1.0),
        torch.compile(Experts(H, INNER, E), backend="eager"),
        torch.add,  # a function of C++, which tells no signature
    ],
)
def test_what_may_be_experts(experts: Any) -> None:
    MoE(H, None, E, K, experts=experts)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda logits: logits.to("meta"), "torch.float32 on meta"),
        (lambda logits: logits.to(torch.complex64), "torch.complex64 on cpu"),
    ],
)
def test_a_router(change: Callable[[Tensor], Tensor], got: str) -> None:
    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return change(super().forward(x))

    moe = MoE(H, INNER, E, K, router=Other(H, E))
    with pytest.raises(RuntimeError, match=rf"^MoE: router must return real .* cpu, got {got}$"):
        moe(torch.randn(T, H))


def test_the_factory_of_an_estimator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._REGISTRY, "nothing", lambda: 3)
    message = r'^register_estimator: factory must return an Estimator for "nothing", got 3$'
    with pytest.raises(TypeError, match=message):
        MoE(H, INNER, E, K, gate=Gate(estimator="nothing"))
