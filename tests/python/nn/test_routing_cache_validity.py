"""RoutingCache: a gate input that was seen before is routed as the router routes it now."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from torchmoe import RoutingCache
from torchmoe.nn import Balance, CosineRouter, Gate, MoE, Router, SequenceRouter

H, I, E, K = 16, 24, 8, 2  # noqa: E741  the glossary's letter


class Shifted(nn.Module):
    """A router with a buffer, and one that cannot be saved."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = E
        self.linear = nn.Linear(H, E)
        self.register_buffer("shift", torch.zeros(E))
        self.register_buffer("scale", torch.ones(E), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale + self.shift


ROUTERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Router(H, E, bias=True, usage_scaling=True),
    "noisy": lambda: Router(H, E, input_jitter=0.1, logit_noise=1.0),
    "cosine": lambda: CosineRouter(H, E),
    "deep": lambda: nn.Sequential(nn.Linear(H, 32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, E)),
    "buffers": Shifted,
    "sequence": lambda: SequenceRouter(Router(H, E), pooling="attention"),
}


def make(router: str, **settings: Any) -> tuple[MoE, Tensor]:
    cache = RoutingCache(64)
    moe = MoE(H, I, E, K, router=ROUTERS[router](), cache=cache, **settings)
    if (usage := getattr(moe.router, "usage", None)) is not None:
        usage.fill_(1 / E)
    return moe, torch.randn(40, 1, H)


def without_entries(moe: MoE) -> MoE:
    """The same layer, which asks its router about every token."""
    other = copy.deepcopy(moe)
    assert other.cache is not None
    other.cache.clear()
    return other


def deciders(moe: MoE) -> list[Tensor]:
    tensors = [*moe.router.parameters(), *moe.router.buffers()]
    return tensors + ([] if moe.selection_bias is None else [moe.selection_bias])


def assert_routed_as_now(moe: MoE, x: Tensor) -> Tensor:
    """In evaluation, where nothing draws; gives the hits."""
    moe.eval()
    routing = moe(x).routing
    assert torch.equal(routing.selected, without_entries(moe)(x).routing.selected)
    moe.train()
    return routing.details["cache_hit"] >= 0


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("through", ["no_grad", "data"])
def test_any_tensor_that_decides(router: str, through: str) -> None:
    """Each alone, by a little and by much, with and without an update after it."""
    for number in range(len(deciders(make(router, balance=Balance(selection_bias_rate=0.1))[0]))):
        for size in (0.0, 0.01, 1.0):
            moe, x = make(router, balance=Balance(selection_bias_rate=0.1))
            moe.update(moe(x).routing)
            assert assert_routed_as_now(moe, x).all()
            tensor = deciders(moe)[number]
            step = size * torch.randn_like(tensor) * tensor.detach().abs().mean().clamp(min=0.3)
            with torch.no_grad():
                if through == "data":
                    tensor.data.add_(step)
                else:
                    tensor.add_(step)
            hits = assert_routed_as_now(moe, x)
            if size == 0:
                assert hits.all()
            moe.update(moe(x).routing)
            assert assert_routed_as_now(moe, x).all()


def test_an_entry_dies_where_its_choice_changes_and_nowhere_else() -> None:
    moe, x = make("linear")
    first = moe(x).routing
    moe.update(first)
    with torch.no_grad():
        moe.router.weight += 0.05 * torch.randn(E, H)
    now = without_entries(moe)(x).routing.selected
    same = (now == first.selected).all(dim=1)
    assert 0 < same.sum() < len(same)
    assert torch.equal(moe(x).routing.details["cache_hit"] >= 0, same)
    cache = moe.cache
    assert cache is not None
    moe.update(moe(torch.randn(0, 1, H)).routing)
    assert (len(cache), cache.invalidated) == (int(same.sum()), int((~same).sum()))


@pytest.mark.parametrize("change", ["score_function", "num_groups", "top_groups"])
def test_the_gates_settings(change: str) -> None:
    gate = Gate(score_function="sigmoid", num_groups=4, top_groups=2)
    moe, x = make("linear", gate=gate)
    moe.update(moe(x).routing)
    value = {"score_function": "softmax", "num_groups": 2, "top_groups": 1}[change]
    moe.estimator.__dict__["_" + change] = value
    assert_routed_as_now(moe, x)
    moe.update(moe(x).routing)
    assert assert_routed_as_now(moe, x).all()


def test_a_bias_that_update_moves() -> None:
    """By steps that turn some choices around at once."""
    moe, x = make("linear", balance=Balance(selection_bias_rate=0.02))
    for _ in range(10):
        moe.update(moe(x).routing)
        assert_routed_as_now(moe, x)
    assert moe.cache is not None
    assert moe.cache.invalidated > 0


def test_loaded_replaced_and_swapped_parameters() -> None:
    moe, x = make("linear")
    moe.update(moe(x).routing)
    assert moe.cache is not None
    saved = moe.cache.state_dict()
    moe.router.load_state_dict(Router(H, E, bias=True, usage_scaling=True).state_dict())
    assert not assert_routed_as_now(moe, x).all()
    moe.router.weight = nn.Parameter(torch.randn(E, H))
    assert_routed_as_now(moe, x)
    others = {"router.weight": torch.randn(E, H)}
    other = without_entries(moe)
    call = torch.func.functional_call
    assert torch.equal(
        call(moe, others, (x,)).routing.selected, call(other, others, (x,)).routing.selected
    )
    assert_routed_as_now(moe, x)
    moe.cache.load_state_dict(saved)
    assert_routed_as_now(moe, x)


def test_under_autocast() -> None:
    """A router of torch's own rounds its logits there, so that other experts are first."""
    moe, x = make("deep")
    x = 0.01 * x
    moe.update(moe(x).routing)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_routed_as_now(moe, x)
        moe.update(moe(x).routing)
        assert assert_routed_as_now(moe, x).all()
    assert_routed_as_now(moe, x)


@given(st.data())
def test_any_course_of_events(data: st.DataObject) -> None:
    moe, x = make("linear", balance=Balance(selection_bias_rate=0.05))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    for _ in range(data.draw(st.integers(1, 8))):
        event = data.draw(st.sampled_from(["step", "update", "other", "bias", "clear"]))
        if event == "step":
            size = data.draw(st.sampled_from([1e-6, 1e-3, 0.1]))
            with torch.no_grad():
                moe.router.weight += size * torch.randn(E, H, generator=generator)
        elif event == "update":
            moe.update(moe(x).routing)
        elif event == "other":
            moe.update(moe(torch.randn(30, 1, H, generator=generator)).routing)
        elif event == "bias":
            assert moe.selection_bias is not None
            moe.selection_bias.uniform_(-0.2, 0.2, generator=generator)
        else:
            assert moe.cache is not None
            moe.cache.clear()
        assert_routed_as_now(moe, x)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_most_entries_outlive_a_hundred_steps(optimizer: type[torch.optim.Optimizer]) -> None:
    """In sizes of a small language model, at the learning rate of one."""
    moe = MoE(64, 64, 8, 2, cache=RoutingCache(512), balance=Balance(0.01))
    cache, x = moe.cache, torch.randn(512, 64)
    assert cache is not None
    moe.update(moe(x).routing)
    steps = optimizer(moe.parameters(), lr=1e-4)
    for _ in range(100):
        output = moe(torch.randn(64, 64))
        (output.hidden_states - 1).square().mean().add(output.aux_loss).backward()
        steps.step()
        steps.zero_grad()
    moe.update(moe(torch.randn(0, 64)).routing)
    assert 256 <= len(cache) < 512 if optimizer is torch.optim.Adam else len(cache) >= 256
    assert_routed_as_now(moe, x)
