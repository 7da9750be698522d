"""State that moves in small steps stays wide, even if a 16-bit tensor is put in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from float_types import NARROW
from torchmoe.nn import Assistance, Balance, Capacity, Gate, MoE, Router

T, H, INNER, E, K = 12, 8, 6, 4, 2

LAYERS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "usage": (lambda: {"balance": Balance(fraction_from="history")}, "router.usage"),
    "usage_scaling": (lambda: {"router": Router(H, E, usage_scaling=True)}, "router.usage"),
    "dynamic": (lambda: {"capacity": Capacity(1, dynamic=True)}, "router.usage"),
    "assistance": (lambda: {"assistance": Assistance((1, 2, 3, 0))}, "router.usage"),
    "selection_bias": (lambda: {"balance": Balance(selection_bias_rate=0.001)}, "selection_bias"),
    "default_vectors": (
        lambda: {"gate": Gate(estimator="default_vector")},
        "estimator.default_vectors",
    ),
}


def by_loading(moe: MoE, name: str, narrow: torch.dtype) -> None:
    state = {key: value.to(narrow) for key, value in moe.state_dict().items()}
    for key, value in moe.state_dict().items():
        if not value.is_floating_point():
            state[key] = value
    moe.load_state_dict(state, assign=True)


def owner(moe: MoE, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return moe.get_submodule(path), last


def by_attribute(moe: MoE, name: str, narrow: torch.dtype) -> None:
    module, last = owner(moe, name)
    setattr(module, last, getattr(module, last).to(narrow))


def in_place(moe: MoE, name: str, narrow: torch.dtype) -> None:
    module, last = owner(moe, name)
    module._buffers[last] = module._buffers[last].to(narrow)


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("load", [by_loading, by_attribute, in_place])
@pytest.mark.parametrize("layer", list(LAYERS))
def test_steps_are_not_lost(
    layer: str, load: Callable[[MoE, str, torch.dtype], None], narrow: torch.dtype
) -> None:
    options, name = LAYERS[layer]
    moe = MoE(H, INNER, E, K, **options())
    load(moe, name, narrow)
    if load is by_loading:
        assert moe.get_buffer(name).dtype == torch.float32
    x = torch.randn(T, H, dtype=moe.experts.down_proj.dtype)
    output = moe(x)  # with whatever there is
    output.aux_loss.backward()
    moe.update(output.routing)
    assert moe.get_buffer(name).dtype == torch.float32
    moe.to(narrow)
    assert moe.get_buffer(name).dtype == torch.float32


@pytest.mark.parametrize("load", [by_loading, by_attribute, in_place])
def test_a_thousand_small_steps(load: Callable[[MoE, str, torch.dtype], None]) -> None:
    """Of 0.001 from 0.5 on, where bfloat16 knows no step below 0.002."""
    moe = MoE(H, INNER, E, K, balance=Balance(selection_bias_rate=0.001))
    moe.selection_bias.fill_(0.5)
    load(moe, "selection_bias", torch.bfloat16)
    routing = moe(torch.randn(T, H, dtype=moe.experts.down_proj.dtype)).routing
    routing = routing._replace(tokens_per_expert=torch.tensor([3, 1, 2, 2]))
    for _ in range(1000):
        moe.update(routing)
    expected: Tensor = 0.5 + torch.tensor([-1.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(moe.selection_bias, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer", list(LAYERS))
def test_float64_stays(layer: str) -> None:
    options, name = LAYERS[layer]
    moe = MoE(H, INNER, E, K, **options()).double()
    state = {key: value.clone() for key, value in moe.state_dict().items()}
    moe.load_state_dict(state, assign=True)
    moe.update(moe(torch.randn(T, H, dtype=torch.float64)).routing)
    assert moe.get_buffer(name).dtype == torch.float64


def test_the_caller_s_state_dict_is_left_alone() -> None:
    moe = MoE(H, INNER, E, K, balance=Balance(selection_bias_rate=0.001))
    state = {key: value.bfloat16() for key, value in moe.state_dict().items()}
    moe.load_state_dict(state, assign=True)
    assert all(value.dtype == torch.bfloat16 for value in state.values())


def test_what_a_loader_narrowed_is_wide_after_the_next_load_or_conversion() -> None:
    usage = torch.tensor([0.2001, 0.1999, 0.3003, 0.2997])  # no bfloat16 numbers
    moe = MoE(H, INNER, E, K, balance=Balance(fraction_from="history"))
    state = moe.state_dict() | {"router.usage": usage}
    in_place(moe, "router.usage", torch.bfloat16)
    moe.load_state_dict(state)
    assert torch.equal(moe.router.usage, usage)
    in_place(moe, "router.usage", torch.bfloat16)
    assert torch.equal(moe.bfloat16().router.usage, usage.bfloat16().float())
    moe.to("meta")
    in_place(moe, "router.usage", torch.bfloat16)
    assert moe.to_empty(device="cpu").router.usage.dtype == torch.float32


def test_widening_keeps_the_tensor_that_others_hold() -> None:
    """DistributedDataParallel looks for a module's buffers once."""
    moe = MoE(H, INNER, E, K, balance=Balance(fraction_from="history"))
    held = moe.router.usage
    held.data = held.data.bfloat16()
    moe.update(moe(torch.randn(T, H)).routing)
    assert moe.router.usage is held
    assert held.dtype == torch.float32
