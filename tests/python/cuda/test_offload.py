"""Offloaded experts on the GPU: the bits of experts that are in its memory, whatever the budget."""

from __future__ import annotations

import copy
import gc
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from on_device import busy_device, no_host_sync
from streamed import Call, Pair, assert_same, drawn, expert_bytes, gradients, pair, slots_of
from torchmoe.nn import Experts, MoE
from torchmoe.offload import link, offload, write_store

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("default")]

TYPES = (torch.float32, torch.bfloat16)


def assert_alike(actual: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert all(torch.equal(*both) for both in zip(a, e, strict=True))


def delay(given: Pair, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Lets the device be some ms late with each copy, or with each group that it computes."""
    memory: Any = given.offloaded._residents.memory
    copy_in, used = memory._copy, memory.used

    def late_copy(into: Mapping[str, Tensor], slot: int) -> None:
        with torch.cuda.stream(memory._stream):
            torch.cuda._sleep(4_000_000)
        copy_in(into, slot)

    @contextmanager
    def late_use(slots: Collection[int]) -> Iterator[None]:
        with used(slots):
            torch.cuda._sleep(4_000_000)
            yield

    name, late = {"copies": ("_copy", late_copy), "computing": ("used", late_use)}[what]
    monkeypatch.setattr(memory, name, late)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("num_slots", [1, 3, 8])
def test_any_number_of_residents(num_slots: int, dtype: torch.dtype, device: str) -> None:
    given = pair(num_slots=num_slots, dtype=dtype, device=device)
    assert given.offloaded.device == torch.device(device)
    for top_k in (1, 2, 4):
        assert_same(given, drawn(given.resident, 30, top_k))
    assert given.offloaded.peak_resident_bytes <= given.offloaded.budget


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_sizes_of_several_blocks(activation: str, dtype: torch.dtype, device: str) -> None:
    """Beside kernels that fill the device."""
    given = pair(
        64, 72, 12, num_slots=4, activation=activation, dtype=dtype, bias=False, device=device
    )
    call = drawn(given.resident, 200, 2)
    with busy_device():
        assert_same(given, call)
        assert_same(given, call)


@pytest.mark.parametrize("late", ["nothing", "copies", "computing"])
@pytest.mark.parametrize("num_slots", [1, 2, 5])
def test_experts_are_evicted_while_they_are_used(
    num_slots: int, late: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = pair(32, 40, num_slots=num_slots, device=device)
    calls = [drawn(given.resident, 64, 2) for _ in range(6)]
    expected = [gradients(given.resident, call) for call in calls]
    if late != "nothing" and device != "cpu":
        delay(given, monkeypatch, late)
    actual = [gradients(given.offloaded, call) for call in calls]
    assert_alike(actual, expected)
    assert given.offloaded.misses > 8
    assert given.offloaded.peak_resident_bytes <= given.offloaded.budget


def test_callers_on_two_streams(real_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert that both have used is evicted when both have finished with it."""
    given = pair(32, 40, num_slots=1, device=str(real_device))
    ids = [torch.full((64, 1), expert) for expert in (0, 0, 1)]
    calls = [drawn(given.resident, 64, 1, ids=i) for i in ids]
    expected = [given.resident(*call[:3]) for call in calls]
    first, second = (torch.cuda.Stream(real_device) for _ in range(2))
    torch.cuda.synchronize()
    actual = []
    for stream, call in zip((first, second, second), calls, strict=True):
        with torch.cuda.stream(stream), torch.no_grad(), monkeypatch.context() as patch:
            if stream == first:
                delay(given, patch, "computing")
            actual.append(given.offloaded(*call[:3]))
    torch.cuda.synchronize()
    assert given.offloaded.hits == 1
    assert_alike([actual], [expected])


def test_the_backward_pass_never_waits_for_the_device(device: str) -> None:
    given = pair(num_slots=3, device=device)
    call = drawn(given.resident, 30, 2)
    expected = gradients(given.resident, call)
    x, weights = call.x.clone().requires_grad_(), call.weights.clone().requires_grad_()
    y = given.offloaded(x, call.indices, weights)
    with no_host_sync():
        y.backward(call.grad)
    assert_alike([[y.detach(), x.grad, weights.grad]], [expected])  # type: ignore[list-item]


def requested() -> int:
    """Bytes of all live tensors on the device, as they were asked for."""
    gc.collect()
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


def test_the_device_holds_the_slots_alone(real_device: torch.device) -> None:
    torch.cuda.synchronize()
    before = requested()
    experts = Experts(32, 40, 16, device=real_device).requires_grad_(False)
    one, budget = expert_bytes(experts), slots_of(experts, 3)
    assert requested() - before == 16 * one
    offloaded = offload(experts, budget=budget)
    assert requested() == before
    assert offloaded.resident_bytes == 0
    call = drawn(offloaded, 64, 2)
    held = requested()
    with torch.no_grad():
        offloaded(*call[:3])
    torch.cuda.synchronize()
    assert requested() - held == 3 * one
    assert offloaded.resident_bytes == 4 * one  # one in pinned memory
    assert offloaded.peak_resident_bytes <= budget


def test_experts_that_were_never_in_memory(device: str, tmp_path: Path) -> None:
    resident = Experts(8, 12, 8, bias=True).requires_grad_(False)
    like = Experts(8, 12, 8, bias=True, device="meta").requires_grad_(False)
    path = tmp_path / "store.safetensors"
    write_store(path, like, lambda e: {n: p[e] for n, p in resident.named_parameters()})
    resident.to(device)
    offloaded = offload(like, budget=slots_of(resident, 2), store=path, device=device)
    assert (offloaded.device, offloaded.num_slots) == (torch.device(device), 2)
    assert_same(Pair(resident, offloaded), drawn(resident, 30, 2))
    state = offloaded.state_dict()
    for name, parameter in resident.named_parameters():
        assert state[name].device.type == "cpu"
        assert torch.equal(state[name], parameter.cpu())
    assert_same(Pair(resident, copy.deepcopy(offloaded)), drawn(resident, 30, 2))


def test_autocast(device: str) -> None:
    given = pair(num_slots=2, dtype=torch.bfloat16, device=device)
    call = drawn(given.resident, 20, 2)
    call = call._replace(x=call.x.float() + 1e-4)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        assert_same(given, call)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints(use_reentrant: bool, device: str) -> None:
    given = pair(num_slots=2, device=device)
    call = drawn(given.resident, 20, 2)

    def run(experts: torch.nn.Module) -> list[Tensor]:
        def repeated(*arguments: Tensor) -> Tensor:
            y: Tensor = checkpoint(experts, *arguments, use_reentrant=use_reentrant)
            return y

        return gradients(repeated, call)

    assert_alike([run(given.offloaded)], [run(given.resident)])


def test_warm(device: str) -> None:
    given = pair(num_slots=3, device=device)
    usage = torch.tensor([0.0, 0.2, 0.1, 0.0, 0.3, 0.1, 0.3, 0.0], device=device)
    given.offloaded.warm(usage)
    ids = torch.tensor([[1, 4], [6, 1], [4, 6]])
    assert_same(given, drawn(given.resident, 3, 2, ids=ids))
    assert given.offloaded.misses == 0


def test_linked_layers(device: str) -> None:
    layers = [MoE(8, 12, 8, 2) for _ in range(3)]
    for layer in layers:
        layer.experts.requires_grad_(False)
        layer.to(device)
    others = copy.deepcopy(layers)
    for layer in others:
        layer.experts = offload(layer.experts, budget=slots_of(layer.experts, 3))
    link(others)

    def run(model: list[MoE], x: Tensor) -> list[Tensor]:
        y = x = x.clone().requires_grad_()
        for layer in model:
            y = y + layer(y).hidden_states
        learned = [layer.router.weight for layer in model]
        return [y.detach(), *torch.autograd.grad(y.sum(), [x, *learned])]

    for _ in range(3):
        x = torch.randn(20, 8).to(device)
        assert_alike([run(others, x)], [run(layers, x)])
    assert 0 <= others[1].experts.prediction_hit_rate <= 1


def test_what_is_elsewhere_is_refused(real_device: torch.device) -> None:
    experts = pair(device=str(real_device)).offloaded
    call: Call = drawn(experts, 10, 2)
    message = rf"^OffloadedExperts: indices must be on the device .*\({real_device}\), got cpu$"
    with pytest.raises(RuntimeError, match=message):
        experts(call.x, call.indices.cpu(), call.weights)
    with pytest.raises(RuntimeError, match=r"^OffloadedExperts: the experts must stay .* on cpu$"):
        experts.cpu()
    assert experts.to(real_device) is experts
    given = Experts(8, 12, 8, device=real_device).requires_grad_(False)
    with pytest.raises(ValueError, match=r"^offload: device must be that of the experts"):
        offload(given, budget=1 << 30, device="cpu")
    assert not given.down_proj.is_meta
