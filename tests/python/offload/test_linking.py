"""Layers that ask for the next layer's experts."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from streamed import AtOnce, slots_of
from torchmoe.nn import CosineRouter, Experts, Gate, HashRouter, MoE, Router, SequenceRouter
from torchmoe.offload import OffloadedExperts, link, offload, write_store
from torchmoe.offload.slots import SLOTS

H, E, K = 8, 8, 2


class Stack(nn.Module):
    """Layers one after the other; `apart` gives each the model's input instead."""

    def __init__(self, layers: list[MoE], apart: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.apart = apart

    def forward(self, x: Tensor) -> Tensor:
        total = x
        for layer in self.layers:
            total = total + layer(x if self.apart else total).hidden_states
        return total


def stack(num_layers: int = 3, *, apart: bool = False, **options: Any) -> Stack:
    layers = []
    for _ in range(num_layers):
        layer = MoE(H, 12, E, K, **options)
        layer.experts.requires_grad_(False)
        layers.append(layer)
    return Stack(layers, apart)


def offloaded(model: Stack, num_slots: int, *, at_once: bool = False, **options: Any) -> Stack:
    """A copy with offloaded experts."""
    model = copy.deepcopy(model)
    for layer in model.layers:
        if isinstance(layer.experts, Experts):
            budget = slots_of(layer.experts, num_slots)
            layer.experts = offload(layer.experts, budget=budget, **options)
            if at_once:
                layer.experts._residents.loader = AtOnce()
    return model


def experts_of(model: Stack) -> list[OffloadedExperts]:
    return [layer.experts for layer in model.layers]


def trained(model: Stack, steps: int = 4) -> list[Tensor]:
    """What a model gives while its routers learn, and where the generator then is."""
    torch.manual_seed(1)
    found = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        x = torch.randn(20, H, requires_grad=True)
        y = model(x)
        y.square().mean().backward()
        optimizer.step()
        found += [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
        optimizer.zero_grad()
    found.append(torch.get_rng_state())
    return found


@pytest.mark.parametrize("num_slots", [1, 3, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": Gate(estimator="gumbel_straight_through")},
        {"router": (Router, {"logit_noise": 1.0, "input_jitter": 0.1})},
        {"router": (CosineRouter, {})},
    ],
    ids=["plain", "drawn", "noisy", "cosine"],
)
def test_results_are_those_of_experts_in_memory(options: dict[str, Any], num_slots: int) -> None:
    """While routers learn, with the same random numbers."""
    model = stack()
    if "router" in options:
        kind, arguments = options["router"]
        model = Stack([_with_router(kind(H, E, **arguments)) for _ in range(3)])
    elif options:
        model = stack(**options)
    other = offloaded(model, num_slots)
    link(other.layers)
    expected, actual = trained(model), trained(other)
    assert len(expected) == len(actual) > 9
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    assert all(part.training for part in other.layers.modules())
    assert math.isnan(experts_of(other)[0].prediction_hit_rate)
    assert all(experts.prediction_hit_rate > 0 for experts in experts_of(other)[1:])


def _with_router(router: nn.Module) -> MoE:
    layer = MoE(H, 12, E, K, router=router)
    layer.experts.requires_grad_(False)
    return layer


def test_predictions_of_layers_that_see_the_same_are_right() -> None:
    model = offloaded(stack(apart=True), 8, at_once=True)
    link(model.layers)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(1, H))
    first, *others = experts_of(model)
    assert first.misses > 0
    assert math.isnan(first.prediction_hit_rate)
    for experts in others:
        assert experts.prediction_hit_rate == 1
        assert experts.misses == 0
        assert experts.hits == 3 * K


def test_a_selection_bias_is_part_of_the_choice() -> None:
    model = offloaded(stack(2, apart=True), 8, at_once=True)
    layer = model.layers[1]
    x = torch.randn(1, H)
    last = int(layer.router(x).argmin())
    layer.selection_bias = torch.zeros(E)
    layer.selection_bias[last] = 100
    link(model.layers)
    model(x)
    assert experts_of(model)[1].prediction_hit_rate == 1
    assert last in experts_of(model)[1]._residents.residents


def test_masked_tokens_do_not_count() -> None:
    model = offloaded(stack(2, apart=True), 8, at_once=True)
    link(model.layers)
    x = torch.randn(6, H)
    mask = torch.tensor([True] + 5 * [False])
    model.layers[0](x, token_mask=mask)
    second = experts_of(model)[1]
    assert second.bytes_read == K * second._file.expert_bytes


def test_a_wrong_prediction_costs_reads_alone() -> None:
    model = stack(2, apart=True)
    other = offloaded(model, 3, at_once=True)
    link(other.layers)
    experts = experts_of(other)[1]
    stream = experts_of(other)[0]._stream
    stream.predict = lambda x, indices: {7: 1}
    x = torch.randn(1, H)
    needed = model.layers[1](x).routing.indices.flatten().tolist()
    assert 7 not in needed
    assert torch.equal(other(x), model(x))
    assert experts.prediction_hit_rate == 0
    assert experts.bytes_read == 3 * experts._file.expert_bytes


def test_a_prediction_evicts_nothing_while_a_call_is_under_way() -> None:
    model = offloaded(stack(1), 2, at_once=True)
    (experts,) = experts_of(model)
    with experts._residents.held():
        experts._stream.prefetch({0: 1}, predicted=True)
    assert experts.bytes_read == 0
    model(torch.randn(4, H))
    assert math.isnan(experts.prediction_hit_rate)


def test_the_likeliest_are_read_as_far_as_there_is_room() -> None:
    model = offloaded(stack(1), 2, at_once=True)
    (experts,) = experts_of(model)
    for _ in range(2):
        experts._stream.prefetch({2: 1, 5: 4, 0: 3, 7: 3}, predicted=True)
        experts._residents.settle()
        assert sorted(experts._residents.residents) == [0, 5]
    assert experts.bytes_read == 2 * experts._file.expert_bytes


def test_the_backward_direction_reads_ahead_too() -> None:
    """With room for the experts of one token, which another token's call has replaced."""
    counted = []
    for linked in (False, True):
        torch.manual_seed(3)
        model = offloaded(stack(3), 2, at_once=True)
        if linked:
            link(model.layers)
        x = torch.randn(1, H, requires_grad=True)
        y = model(x)
        with torch.no_grad():
            model(-3 * x)
        before = [experts.misses for experts in experts_of(model)]
        y.sum().backward()
        counted.append([e.misses - b for e, b in zip(experts_of(model), before, strict=True)])
    without, with_links = counted
    assert sum(without[:2]) > 0
    assert with_links == [0, 0, without[2]]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_is_recomputed_looks_back(use_reentrant: bool) -> None:
    model = offloaded(stack(3), 3, at_once=True)
    link(model.layers)
    middle = experts_of(model)[1]._stream
    asked: list[str] = []
    predict, look_back = middle.predict, middle._look_back
    middle.predict = lambda *call: asked.append("ahead") or predict(*call)  # type: ignore[func-returns-value, misc]
    middle._look_back = lambda: asked.append("back") or look_back()  # type: ignore[func-returns-value, method-assign]
    x = torch.randn(4, H, requires_grad=True)
    y = checkpoint(model, x, use_reentrant=use_reentrant)
    assert asked == ["ahead"]
    y.sum().backward()
    assert asked == ["ahead", "back", "back"]  # when it is run again, and its own backward pass


def test_predictions_are_read_while_a_call_computes() -> None:
    """The next call then finds what it needs."""
    model = offloaded(stack(2, apart=True), 8)
    link(model.layers)
    first, second = experts_of(model)
    assert first._residents.loader is second._residents.loader
    x = torch.randn(1, H)
    with torch.no_grad():
        model.layers[0](x)
        deadline = time.monotonic() + 30
        while second._residents.is_reading and time.monotonic() < deadline:
            time.sleep(0.001)
        model.layers[1](x)
    assert (second.hits, second.misses) == (K, 0)


def test_a_layer_that_is_not_predicted_for() -> None:
    model = stack(3, apart=True)
    other = offloaded(model, 4, at_once=True)
    layer = copy.deepcopy(model.layers[1])
    budget = slots_of(layer.experts, 4)
    layer.experts = offload(layer.experts, budget=budget, prefetch=False)
    other.layers[1] = layer
    link(other.layers)
    other(torch.randn(4, H))
    _, second, third = experts_of(other)
    assert math.isnan(second.prediction_hit_rate)
    assert third.prediction_hit_rate == 1


def test_layers_with_experts_in_memory_are_passed_over() -> None:
    model = stack(3, apart=True)
    other = offloaded(model, 4, at_once=True)
    other.layers[1] = model.layers[1]
    link([nn.Sequential(*other.layers)])
    other(torch.randn(4, H))
    assert other.layers[2].experts.prediction_hit_rate == 1
    link([])
    link([model])


def test_links_end_with_the_layer() -> None:
    model = offloaded(stack(2), 3)
    link(model.layers)
    first = model.layers[0]
    x = torch.randn(4, H, requires_grad=True)
    expected = first(x).hidden_states
    del model
    assert torch.equal(first(x).hidden_states, expected)
    first(x).hidden_states.sum().backward()


def test_a_copy_has_no_links() -> None:
    model = offloaded(stack(2), 3)
    link(model.layers)
    copied = copy.deepcopy(model)
    x = torch.randn(4, H)
    assert torch.equal(copied(x), model(x))
    assert math.isnan(experts_of(copied)[1].prediction_hit_rate)
    assert experts_of(model)[1].prediction_hit_rate >= 0


def test_what_is_refused() -> None:
    model = offloaded(stack(2), 3)
    with pytest.raises(TypeError, match=r"^link: layers must be modules, got 3$"):
        link([3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"^link: layers must be modules, got 3$"):
        link(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^link: layers must have experts of their own, got"):
        link([*model.layers, model.layers[0]])
    for router in (HashRouter(E, K), SequenceRouter(Router(H, E))):
        layer = MoE(H, None, E, K, router=router, experts=experts_of(model)[1])
        name = type(router).__name__
        with pytest.raises(ValueError, match=rf"^link: layers must have routers .*, got {name}$"):
            link([model.layers[0], layer])
    wide = MoE(2 * H, 12, E, K)
    wide.experts.requires_grad_(False)
    wide.experts = offload(wide.experts, budget=1 << 30)
    with pytest.raises(ValueError, match=r"^link: layers must have one hidden_size, got 8 and 16$"):
        link([model.layers[0], wide])


def test_layers_on_several_devices_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(SLOTS, "meta", SLOTS["cpu"])  # of another device, which is always there
    path = tmp_path / "store.safetensors"
    write_store(path, Experts(H, 12, E))
    like = Experts(H, 12, E, device="meta").requires_grad_(False)
    layers = [
        MoE(H, None, E, K, experts=offload(like, budget=1 << 20, store=path, device=device))
        for device in ("cpu", "cpu", "meta")
    ]
    link(layers[:2])
    with pytest.raises(ValueError, match=r"^link: layers must be on one device, got cpu and meta$"):
        link(layers)


def test_a_router_that_reads_something_else_is_named() -> None:
    model = offloaded(stack(2), 3)
    model.layers[1].router = Router(3, E)  # reads router_input
    link(model.layers)
    with pytest.raises(RuntimeError, match=r"^link: layers must have routers .* error of Router$"):
        model.layers[0](torch.randn(4, H))
