"""torch.jit.script of a layer, its parts and models with them; and the ways out that it names."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import torchmoe.nn
from built_in import ESTIMATORS, ROUTERS, make_router
from torchmoe.nn import (
    Assistance,
    Capacity,
    Estimator,
    ExpertCommunication,
    ExpertList,
    Experts,
    Gate,
    MoE,
    SharedExperts,
    WithAttachedLoss,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

T, H, INNER, E, K = 7, 8, 5, 4, 2


class Temperature(Estimator):
    """An estimator of a user's own."""


class Block(nn.Module):
    """A model of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = MoE(H, INNER, E, K)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(x).hidden_states


def encoder_layer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(H, 2)
    layer.linear1 = WithAttachedLoss(MoE(H, INNER, E, K))
    return layer


MODULES = {
    "MoE": lambda: MoE(H, INNER, E, K, capacity=Capacity(1.25)),
    "Experts": lambda: Experts(H, INNER, E),
    "ExpertList": lambda: ExpertList([nn.Linear(H, H) for _ in range(E)]),
    "SharedExperts": lambda: SharedExperts(H, INNER),
    "ExpertCommunication": lambda: ExpertCommunication(
        Experts(H, INNER, E), hidden_size=H, num_experts=E
    ),
    **{kind.__name__: lambda kind=kind: make_router(kind, H, E, K) for kind in ROUTERS},
    "Assistance": lambda: Assistance(backup=(1, 2, 3, 0)),
    "WithAttachedLoss": lambda: WithAttachedLoss(MoE(H, INNER, E, K)),
    "Estimator": Temperature,
    "a model": Block,
    "nn.Sequential": lambda: nn.Sequential(nn.Linear(H, H), nn.Sequential(MoE(H, INNER, E, K))),
    "nn.TransformerEncoderLayer": encoder_layer,
    "a layer with parts of its user's": lambda: MoE(
        H, None, E, K, router=nn.Linear(H, E), experts=lambda x, indices, weights: x
    ),
    **{
        name: lambda name=name: MoE(H, INNER, E, K, gate=Gate(estimator=name))
        for name in ESTIMATORS
    },
}


@pytest.mark.parametrize("name", MODULES)
def test_one_clear_sentence(name: str) -> None:
    with pytest.raises(
        RuntimeError,
        match=r"^torch\.jit\.script: the model must have no part of torchmoe, which TorchScript "
        r"cannot compile, got \w+; use torch\.compile or torch\.export$",
    ):
        torch.jit.script(MODULES[name]())


def test_every_public_module_is_tried() -> None:
    modules = {
        name
        for name in torchmoe.nn.__all__
        if inspect.isclass(part := getattr(torchmoe.nn, name)) and issubclass(part, nn.Module)
        # Of the estimators every name is tried, in a layer.
        if not issubclass(part, Estimator) or part is Estimator
    }
    assert modules - {"ContextRouter"} <= set(MODULES)


def test_a_model_without_a_part_is_scripted() -> None:
    model = nn.Sequential(nn.Linear(H, H), nn.ReLU())
    x = torch.randn(T, H)
    assert_close(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize("training", [False, True])
def test_the_ways_out(training: bool) -> None:
    model = Block().train(training)
    x = torch.randn(T, H)
    expected = model(x)
    assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    exported = torch.export.export(model, (x,))
    assert_close(exported.module()(x), expected)
