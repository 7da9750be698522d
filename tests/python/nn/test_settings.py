"""Settings of a module are fixed, or checked whenever they are set; no other number is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from built_in import ESTIMATORS, make_router, without
from torchmoe.nn import (
    Assistance,
    Balance,
    Capacity,
    CosineRouter,
    ExpertChoiceRouter,
    ExpertCommunication,
    ExpertList,
    Experts,
    Gate,
    HashRouter,
    MoE,
    Router,
    SequenceRouter,
    SharedExperts,
    WithAttachedLoss,
)

H, INNER, E, K = 4, 3, 4, 2

MODULES: dict[str, Callable[[], nn.Module]] = {
    "moe": lambda: MoE(H, INNER, E, K),
    "attached": lambda: WithAttachedLoss(MoE(H, INNER, E, K)),
    "assistance": lambda: Assistance([1, 2, 3, 0]),
    "experts": lambda: Experts(H, INNER, E),
    "list": lambda: ExpertList([nn.Identity()]),
    "communication": lambda: ExpertCommunication(Experts(H, INNER, E), H, E, size=4),
    "shared": lambda: SharedExperts(H, INNER),
    "router": lambda: Router(H, E, usage_scaling=True),
    "cosine": lambda: CosineRouter(H, E),
    "hash": lambda: HashRouter(E, K),
    "sequence": lambda: SequenceRouter(Router(H, E)),
    "expert_choice": lambda: ExpertChoiceRouter(Router(H, E), K),
    **{
        kind.__name__: lambda name=name: MoE(H, INNER, E, K, gate=Gate(estimator=name)).estimator
        for name, kind in ESTIMATORS.items()
    },
}
MODULES |= {
    name: lambda kind=kind: make_router(kind, H, E, K)
    for name, kind in without([type(make()) for make in MODULES.values()]).items()
}
every_module = pytest.mark.parametrize("name", MODULES)

#: What torch itself keeps on each module.
OF_TORCH = {"training", "call_super_init", "dump_patches", "T_destination"}


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Every public attribute that is neither a part, a tensor, a method nor declared by a class."""
    of_torch = set(dir(nn.Module)) | OF_TORCH
    held = {*module._parameters, *module._buffers, *module._modules}
    found = {}
    for name in dir(module):
        if name.startswith("_") or name in of_torch | held:
            continue
        value = getattr(module, name)
        if not callable(value) and not isinstance(value, torch.Tensor):
            found[name] = value
    return found


@every_module
def test_nothing_public_is_kept_unchecked(name: str) -> None:
    """A plain attribute would take any value, and reach some of those who read it."""
    kept = {key for key in vars(MODULES[name]()) if not key.startswith("_")}
    assert kept == {"training"}


@every_module
@pytest.mark.parametrize("value", [math.nan, -1, "unknown", [3], torch.ones(2)], ids=str)
def test_wrong_values_are_refused_later_too(name: str, value: object) -> None:
    module = MODULES[name]()
    before = settings_of(module)
    for key in before:
        if isinstance(getattr(type(module), key), str | bool | tuple | type(None)):
            continue  # what the class declares of itself
        if (key, str(value)) == ("scale", "-1"):
            continue  # a loss may be attached with any sign
        with pytest.raises((AttributeError, ValueError, TypeError)):
            setattr(module, key, value)
    assert settings_of(module) == before


@every_module
def test_what_is_fixed_says_so(name: str) -> None:
    module = MODULES[name]()
    for key in ("num_experts", "hidden_size", "top_k", "seed", "usage_scaling", "threshold"):
        if key in settings_of(module) and name != "list":  # which counts its modules
            setattr(module, key, getattr(module, key))  # as a loader does
            for value in (17, torch.tensor([1, 2])):
                message = rf": {key} must stay .*, as the module was made, got (17|a tensor)"
                with pytest.raises(AttributeError, match=message):
                    setattr(module, key, value)


def test_settings_are_replaced_whole() -> None:
    moe = MoE(H, INNER, E, K)
    moe.balance, moe.capacity = Balance(0.5, z_loss_weight=0.5), Capacity(1, order="token")
    x = torch.randn(6, H)
    routing = moe(x).routing
    assert set(routing.losses) == {"load_balancing_loss", "router_z_loss"}
    assert routing.kept_per_expert.max() <= 3
    moe.capacity = Capacity(1, overflow="backup", backup=(1, 2, 3, 0))
    assert moe(x).routing.kept_per_expert.sum() == 12
    moe.capacity = None
    assert torch.equal(moe(x).routing.indices, moe(x).routing.selected)


def test_refused_settings_change_nothing() -> None:
    moe = MoE(H, INNER, E, K, capacity=Capacity(1))
    for name, wrong in (
        ("balance", Balance(fraction_from="history")),
        ("balance", Balance(selection_bias_rate=0.1)),
        ("balance", None),
        ("capacity", Capacity(1, dynamic=True)),
        ("capacity", Capacity(1, overflow="backup", backup=(1, 0))),
        ("capacity", 1.25),
    ):
        with pytest.raises((TypeError, ValueError), match=r"^MoE: "):
            setattr(moe, name, wrong)
    assert (moe.balance, moe.capacity) == (Balance(), Capacity(1))
    moe(torch.randn(6, H))
