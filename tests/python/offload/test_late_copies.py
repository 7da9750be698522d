"""The order of copies and computing on a device, with streams that run late (late_streams.py)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from torch import Tensor

from late_streams import LateDevice, LateEvent, LateStream
from streamed import Call, Pair, drawn, expert_bytes, gradients, pair
from torchmoe.nn import MoE
from torchmoe.offload import link
from torchmoe.offload.slots import SLOTS

EAGER = ("copies", "computing", "any")


@pytest.fixture(params=EAGER)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LateDevice:
    return installed(request.param, monkeypatch)


def installed(eager: str, monkeypatch: pytest.MonkeyPatch) -> LateDevice:
    """A device that offloaded experts take for one of CUDA."""
    device = LateDevice(eager)
    device.install(monkeypatch)
    monkeypatch.setitem(SLOTS, "cpu", SLOTS["cuda"])
    return device


def late_gradients(device: LateDevice, given: Pair, calls: list[Call]) -> list[list[Tensor]]:
    """Of calls that are asked for one behind the other, when all of them have run."""
    with device.on(device.computing[0]):
        found = [gradients(given.offloaded, call) for call in calls]
    device.run_all()
    return found


def are_equal(actual: list[list[Tensor]], expected: list[list[Tensor]]) -> bool:
    assert len(actual) == len(expected)
    return all(
        torch.equal(a, e)
        for of_call in zip(actual, expected, strict=True)
        for a, e in zip(*of_call, strict=True)
    )


@pytest.mark.parametrize("num_slots", [1, 2, 3, 8])
def test_late_copies_give_the_same_bits(device: LateDevice, num_slots: int) -> None:
    given = pair(num_slots=num_slots)
    calls = [drawn(given.resident, 20, 2) for _ in range(4)]
    expected = [gradients(given.resident, call) for call in calls]
    assert are_equal(late_gradients(device, given, calls), expected)
    assert given.offloaded.misses > 0


Waits = Callable[[LateStream, LateEvent], bool]

# Whether `stream` is one that copies; `event` one of such a stream.
WAITS: dict[str, Waits] = {
    "a copy for computing": lambda stream, event: is_copying(stream) and not is_copying(event),
    "computing for a copy": lambda stream, event: not is_copying(stream) and is_copying(event),
}


def is_copying(place: LateStream | LateEvent) -> bool:
    stream = place.stream if isinstance(place, LateEvent) else place
    return stream not in stream.device.computing


def without(wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves one of the waits out."""
    if wait == "a read for a copy":
        monkeypatch.setattr(LateEvent, "synchronize", lambda event: None)
        return
    original, leaves_out = LateStream.wait_event, WAITS[wait]

    def wait_event(stream: LateStream, event: LateEvent) -> None:
        if not leaves_out(stream, event):
            original(stream, event)

    monkeypatch.setattr(LateStream, "wait_event", wait_event)


@pytest.mark.parametrize(
    ("wait", "eager"),
    [
        ("a copy for computing", "copies"),
        ("computing for a copy", "computing"),
        ("a read for a copy", "computing"),
    ],
)
def test_a_wait_that_is_missing_would_be_seen(
    wait: str, eager: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = installed(eager, monkeypatch)
    without(wait, monkeypatch)
    given = pair(num_slots=2)
    calls = [drawn(given.resident, 20, 2) for _ in range(4)]
    expected = [gradients(given.resident, call) for call in calls]
    assert not are_equal(late_gradients(device, given, calls), expected)


def test_new_memory_may_still_be_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the current stream has been asked for before; then the first copy waits for it."""
    device = installed("copies", monkeypatch)
    given = pair(num_slots=8)
    call = drawn(given.resident, 20, 2)
    expected = gradients(given.resident, call)
    assert are_equal(late_gradients(device, given, [call]), [expected])
    without("a copy for computing", monkeypatch)
    given = Pair(given.resident, pair(num_slots=8).offloaded)
    assert late_gradients(device, given, [call])[0][0].isnan().any()


def of_expert(given: Pair, expert: int) -> Call:
    return drawn(given.resident, 5, 1, ids=torch.full((5, 1), expert))


@pytest.mark.parametrize("is_seen", [True, False])
def test_callers_on_two_streams(is_seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert that both have used is evicted when both have finished with it."""
    device = installed("copies", monkeypatch)
    first, second = device.computing
    if not is_seen:
        monkeypatch.setitem(WAITS, "one", lambda stream, event: event.stream is first)
        without("one", monkeypatch)
    given = pair(num_slots=1)
    calls = [of_expert(given, expert) for expert in (0, 0, 1)]
    expected = [given.resident(*call[:3]) for call in calls]
    found = []
    with torch.no_grad():
        for stream, call in zip((first, second, second), calls, strict=True):
            with device.on(stream):
                found.append(given.offloaded(*call[:3]))
    device.run_all()
    assert given.offloaded.hits == 1
    assert are_equal([found], [expected]) == is_seen


def test_the_allocator_is_told_of_every_stream(device: LateDevice) -> None:
    given = pair(num_slots=3)
    for stream in device.computing:
        with device.on(stream):
            gradients(given.offloaded, drawn(given.resident, 20, 2))
    device.run_all()
    memory = given.offloaded._residents.memory
    for matrix in memory.matrices.values():
        assert device.kept[matrix.data_ptr()] == set(device.streams)
    assert len(device.streams) == 3
    assert {tensor.data_ptr() for tensor in memory._pinned.values()} <= device.pinned  # type: ignore[attr-defined]


def test_a_call_waits_for_the_device_once(device: LateDevice) -> None:
    """To learn which experts it needs; its backward pass knows them."""
    given = pair(num_slots=3)
    call = drawn(given.resident, 20, 2)
    with device.on(device.computing[0]):
        x = call.x.clone().requires_grad_()
        y = given.offloaded(x, *call[1:3])
        assert device.waits == 1
        y.backward(call.grad)
        assert device.waits == 1
    device.run_all()
    assert given.offloaded.hits < given.offloaded.misses


def test_the_pinned_memory_is_part_of_the_budget(device: LateDevice) -> None:
    given = pair(num_slots=3)
    experts, one = given.offloaded, expert_bytes(given.resident)
    assert experts.budget == 4 * one + experts._file.window_bytes
    assert experts.resident_bytes == experts.peak_resident_bytes == 0
    late_gradients(device, given, [drawn(given.resident, 30, 3)])
    assert experts.resident_bytes == 4 * one
    assert experts.peak_resident_bytes == experts.budget
    message = rf"^offload: budget must be at least {2 * one + experts._file.window_bytes}, "
    with pytest.raises(ValueError, match=message):
        pair(num_slots=0)


def test_a_read_that_fails(device: LateDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the slot and the pinned memory to the next one."""
    given = pair(num_slots=2)
    calls = [of_expert(given, expert) for expert in range(3)]
    expected = [gradients(given.resident, call) for call in calls]
    original = given.offloaded._file.read

    def fail(expert: int, into: Mapping[str, Tensor]) -> int:
        for tensor in into.values():
            tensor.fill_(torch.nan)
        raise OSError(5, "offload: cannot read the store", "there")

    with device.on(device.computing[0]):
        found = [gradients(given.offloaded, call) for call in calls]
        monkeypatch.setattr(given.offloaded._file, "read", fail)
        with pytest.raises(OSError, match="cannot read the store"):
            gradients(given.offloaded, calls[0])
        monkeypatch.setattr(given.offloaded._file, "read", original)
        found += [gradients(given.offloaded, call) for call in calls]
    device.run_all()
    assert are_equal(found, expected * 2)


def test_two_reading_threads_share_the_pinned_memory(
    device: LateDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a layer that is linked while it reads."""
    given = pair(num_slots=2)
    memory = given.offloaded._residents.memory
    original = given.offloaded._file.read
    both = threading.Barrier(2)

    def read(expert: int, into: Mapping[str, Tensor]) -> int:
        num_bytes = original(expert, into)
        with suppress(threading.BrokenBarrierError):
            both.wait(0.2)  # in vain
        return num_bytes

    monkeypatch.setattr(given.offloaded._file, "read", read)
    with ThreadPoolExecutor(2) as threads:
        for reading in [threads.submit(memory.reading(expert, expert)) for expert in range(2)]:
            reading.result()
    device.run_all()
    for name, parameter in given.resident.named_parameters():
        assert torch.equal(memory.matrices[name], parameter[:2])


def test_linked_layers(device: LateDevice) -> None:
    """Which are read by one thread, each into pinned memory of its own."""
    pairs = [pair(num_slots=2) for _ in range(3)]
    layers = [MoE(8, None, 8, 2, experts=given.offloaded) for given in pairs]
    x = torch.randn(12, 8)

    def run() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = leaf
        for layer in layers:
            y = y + layer(y).hidden_states
        return [y.detach(), *torch.autograd.grad(y.sum(), leaf)]

    for layer, given in zip(layers, pairs, strict=True):
        layer.experts = given.resident
    expected = [run() for _ in range(3)]
    for layer, given in zip(layers, pairs, strict=True):
        layer.experts = given.offloaded
    link(layers)
    with device.on(device.computing[0]):
        found = [run() for _ in range(3)]
    device.run_all()
    assert are_equal(found, expected)
