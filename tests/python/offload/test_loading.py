"""Reads that fail or take their time, and callers in several threads and processes."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from streamed import assert_same, drawn, gradients, pair
from torchmoe.offload import OffloadedExperts

HERE = Path(__file__).parents[1]
Read = Callable[[int, Mapping[str, Tensor]], int]


def replace_read(experts: OffloadedExperts, around: Callable[[Read, int], None]) -> Read:
    """Runs `around(original, expert)` before each read of the store."""
    original: Read = experts._file.read

    def read(expert: int, into: Mapping[str, Tensor]) -> int:
        around(original, expert)
        return original(expert, into)

    experts._file.read = read  # type: ignore[method-assign]
    return original


def loading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "torchmoe-offload" in thread.name]


@pytest.mark.parametrize("num_slots", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_results_do_not_depend_on_when_experts_arrive(seed: int, num_slots: int) -> None:
    given = pair(num_slots=num_slots)
    draw = random.Random(seed)
    replace_read(given.offloaded, lambda *_: time.sleep(draw.choice([0, 0, 0.001, 0.004])))
    for _ in range(3):
        assert_same(given, drawn(given.resident, 30, 3))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("num_slots", [1, 3])
def test_a_read_that_fails(num_slots: int, direction: str) -> None:
    """The caller gets the error, and the next call is as if nothing had happened."""
    given = pair(num_slots=num_slots)
    experts = given.offloaded
    call = drawn(given.resident, 30, 2, ids=torch.randint(0, 8, (30, 2)))
    broken: set[int] = set()

    def fail(_: Read, expert: int) -> None:
        if expert in broken:
            raise OSError(5, "offload: cannot read the store", "there")

    replace_read(experts, fail)
    y = experts(call.x.clone().requires_grad_(), *call[1:3])
    absent = next(e for e in range(8) if e not in experts._residents.residents)
    broken.add(absent)
    run = {
        "forward": lambda: experts(*call[:3]),
        "backward": lambda: y.backward(call.grad, retain_graph=True),
    }[direction]
    for _ in range(2):
        with pytest.raises(OSError, match="cannot read the store"):
            run()
        assert absent not in experts._residents.residents
    broken.clear()
    assert_same(given, call)
    counted = len(experts._residents.residents) + len(experts._residents._free)
    assert counted == num_slots
    assert experts.peak_resident_bytes <= experts.budget
    calls = experts.hits + experts.misses
    assert calls == 8 * (1 + 2 + 3)  # whole ones and those that failed
    assert experts.bytes_read < experts.misses * experts._file.expert_bytes


def test_a_call_goes_before_what_was_only_predicted() -> None:
    """What is being read is read to its end; what has not begun is given up."""
    given = pair(num_slots=4)
    experts = given.offloaded
    read: list[int] = []
    began, go_on = threading.Event(), threading.Event()

    def note(_: Read, expert: int) -> None:
        read.append(expert)
        began.set()
        go_on.wait()

    replace_read(experts, note)
    experts._stream.prefetch({0: 3, 1: 2, 2: 1, 5: 1}, predicted=True)
    began.wait()
    threading.Timer(0.05, go_on.set).start()
    call = drawn(given.resident, 4, 1, ids=torch.tensor([[5], [6], [6], [5]]))
    with torch.no_grad():
        assert torch.equal(experts(*call[:3]), given.resident(*call[:3]))
    assert read == [0, 5, 6]
    assert sorted(experts._residents.residents) == [0, 5, 6]
    assert (experts.hits, experts.misses, experts.prediction_hit_rate) == (0, 2, 0.5)


def test_a_store_that_is_cut_short_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "store.safetensors"
    given = pair(num_slots=2, store=path)
    assert given.offloaded.store == str(path)
    call = drawn(given.resident, 30, 2, ids=torch.randint(0, 8, (30, 2)))
    assert_same(given, call)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(RuntimeError, match=f"^offload: store must .*{path}"):
        given.offloaded(*call[:3])


def test_a_store_that_is_written_to_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "store.safetensors"
    given = pair(num_slots=2, store=path)
    call = drawn(given.resident, 30, 2, ids=torch.randint(0, 8, (30, 2)))
    assert_same(given, call)
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\0" * 8)
    with pytest.raises(RuntimeError, match=f"^offload: store must .*{path}"):
        given.offloaded(*call[:3])


@pytest.mark.parametrize("num_slots", [1, 3, 8])
def test_callers_in_several_threads(num_slots: int) -> None:
    given = pair(num_slots=num_slots)
    calls = [drawn(given.resident, 20, 2) for _ in range(12)]
    expected = [gradients(given.resident, call) for call in calls]
    with ThreadPoolExecutor(4) as callers:
        actual = list(callers.map(lambda call: gradients(given.offloaded, call), calls * 3))
    for a, e in zip(actual, expected * 3, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, e, strict=True))
    experts = given.offloaded
    assert experts.peak_resident_bytes <= experts.budget
    needed = sum(call.indices[(call.indices >= 0) & (call.indices < 8)].unique().numel()
                 for call in calls)  # fmt: skip
    assert experts.hits + experts.misses == 2 * 3 * needed


def test_the_thread_ends_with_the_module() -> None:
    before = loading_threads()  # some of which may be ending now

    def new_threads() -> list[threading.Thread]:
        return [thread for thread in loading_threads() if thread not in before]

    given = pair(num_slots=2)
    assert not new_threads()  # it begins with the first read
    gradients(given.offloaded, drawn(given.resident, 10, 2))
    (thread,) = new_threads()
    del given
    thread.join(10)
    assert not thread.is_alive()


def test_a_graph_keeps_what_its_backward_pass_needs() -> None:
    given = pair(num_slots=2)
    call = drawn(given.resident, 10, 2)
    expected = gradients(given.resident, call)
    x, weights = call.x.clone().requires_grad_(), call.weights.clone().requires_grad_()
    y = given.offloaded(x, call.indices, weights)
    del given
    gc.collect()
    y.backward(call.grad)
    assert torch.equal(x.grad, expected[1])
    assert torch.equal(weights.grad, expected[2])


# A child that is forked while another thread is in the middle of a call.
FORK = """
import os, signal, sys, threading, warnings
import torch
from streamed import assert_same, drawn, pair

torch.set_num_threads(1)
given = pair(num_slots=3)
call = drawn(given.resident, 30, 2)
assert_same(given, call)
original = given.offloaded._file.read
reading, go_on = threading.Event(), threading.Event()


def read(expert, into):
    reading.set()
    go_on.wait()
    return original(expert, into)


given.offloaded._file.read = read
caller = threading.Thread(target=lambda: given.offloaded(*call[:3]))
caller.start()
reading.wait()
warnings.simplefilter("ignore")  # Python's own, about forking with threads
child = os.fork()
if child == 0:
    signal.alarm(30)  # ends a child that waits for a thread which it has not
    given.offloaded._file.read = original
    for _ in range(2):
        assert_same(given, call)
    assert given.offloaded.peak_resident_bytes <= given.offloaded.budget
    os._exit(0)
status = os.waitpid(child, 0)[1]
go_on.set()
caller.join()
assert_same(given, call)
sys.exit(os.waitstatus_to_exitcode(status) and f"the child ended with status {status}")
"""

# The interpreter ends while a read goes on, with a module that is still there.
EXIT = """
import time
import torch
from streamed import drawn, pair

given = pair(num_slots=3)
given.offloaded(*drawn(given.resident, 30, 2)[:3])
original = given.offloaded._file.read
given.offloaded._file.read = lambda *given: time.sleep(0.2) or original(*given)
absent = next(e for e in range(8) if e not in given.offloaded._residents.residents)
given.offloaded._stream.prefetch({absent: 1}, predicted=True)
"""


@pytest.mark.parametrize("script", [FORK, EXIT], ids=["fork", "exit"])
def test_processes_end(script: str) -> None:
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=HERE)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""


def test_temporary_stores_have_no_name() -> None:
    given = pair(num_slots=2)
    assert given.offloaded.store is None
    path = Path(given.offloaded._file.path)
    assert not path.exists()
    assert not path.parent.exists()
    assert_same(given, drawn(given.resident, 10, 2))
