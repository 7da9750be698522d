"""How long a step with offloaded experts takes, from a few numbers of the machine."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchmoe import ops
from torchmoe._checks import (
    check_among,
    check_at_least,
    check_counts,
    check_flag,
    check_kind,
    check_not_negative,
    check_number,
    check_positive,
    shown,
)
from torchmoe.nn import Experts
from torchmoe.offload.entry import offload
from torchmoe.offload.layout import stored_sizes
from torchmoe.offload.store import ExpertStore
from torchmoe.offload.writing import write_store

SAMPLE = 256 << 20  # bytes of experts that are measured: more than a processor's caches hold
MOST = 256  # of them
MANY_ROWS = 256  # of an expert, so many that reading its matrices takes a small part of the time
ROUNDS = 5  # of each measurement, of which the median counts


class Machine(NamedTuple):
    """What `measure_machine` measures, under the names of the arguments of `plan_offload`.

    Attributes:
        bandwidth: bytes of experts that are read from the store in a second.
        flops: floating-point operations of the experts' products in a second, of many rows.
        memory_bandwidth: bytes of resident experts' matrices that the products of a few rows go
            through in a second.
        overhead: seconds of a call beside its products and reads.
        overlap: in [0, 1], how much of reading and computing goes on at once: 1 where neither slows
            the other, 0 where one waits for the other, as where every core computes and reading
            copies through one of them.
    """

    bandwidth: float
    flops: float
    memory_bandwidth: float
    overhead: float
    overlap: float


class OffloadPlan(NamedTuple):
    """What `plan_offload` predicts; seconds of one step, over all layers.

    Attributes:
        step_time: of the experts.
        load_time: of reading alone.
        compute_time: of computing alone, as without offloading.
        break_even_hit_rate: the hit rate from which reading hides behind computing: no computing
            waits for it any more, so that step_time is compute_time if overlap is 1.
        fits: whether the budget holds one expert and what reading needs; `offload` refuses it
            otherwise, and the times are infinite.
        hit_rate: what the times were formed with.
    """

    step_time: float
    load_time: float
    compute_time: float
    break_even_hit_rate: float
    fits: bool
    hit_rate: float


def plan_offload(
    experts: Experts,
    *,
    num_tokens: int,
    top_k: int,
    budget: int,
    bandwidth: float,
    flops: float,
    memory_bandwidth: float,
    overhead: float = 0.0,
    overlap: float = 1.0,
    num_layers: int = 1,
    hit_rate: float | None = None,
    usage: Tensor | None = None,
    prefetch: bool = False,
    training: bool = False,
) -> OffloadPlan:
    """Predicts how long a step's experts take with `torchmoe.offload.offload`.

    Of E experts with the usage u, T tokens of K choices need n, and n (1 - hit_rate) of them are
    read:

        n = sum over experts of 1 - (1 - min(1, K u_i))^T
        m = n (1 - hit_rate)

    An expert of B bytes takes l seconds to read and c to compute for its r = T K / n rows. With 2 P
    operations for a row, P being the elements of its matrices:

        l = B / bandwidth,   c = B / memory_bandwidth + 2 P r / flops

    Few rows are bound by going through the matrices, many by the arithmetic. A call computes what
    is resident while the first of the others is read, and each of those when it has arrived, so
    that the last waits for all reads, or all the work waits for the first:

        call = overhead + max(n c, m l + c, l + m c)        for m >= 1
             = overhead + n c                               for m = 0, and on a line between

    With linked layers (`prefetch`) the reads of all but the first layer overlap the layer before:

        call = max(overhead + n c, m l)

    That is so where reading and computing do not slow each other. With an overlap below 1, the rest
    of a call takes overhead + n c + m l, one after the other. In training the backward pass of
    frozen experts has as many products as the forward pass, and reads again: everything counts
    twice.

    The numbers of the machine come from `measure_machine`:

        machine = measure_machine(experts)
        plan = plan_offload(experts, num_tokens=1, top_k=2, budget=1 << 30, **machine._asdict())

    Args:
        experts: their sizes, dtype and number; the meta device is enough.
        num_tokens: T of a call.
        top_k: K.
        budget: bytes for each layer, as of `offload` on the CPU.
        bandwidth: bytes per second from the store.
        flops: floating-point operations per second.
        memory_bandwidth: bytes per second of matrices in memory.
        overhead: seconds of a call.
        overlap: in [0, 1], see `Machine`.
        num_layers: layers of this kind, each with the budget.
        hit_rate: in [0, 1], the share of the experts needed that are not read for the call: 1 -
            bytes_read / (expert_bytes * (hits + misses)) of an `OffloadedExperts`. None: as if the
            most used experts were resident, as many as the budget holds.
        usage: [E], each expert's share of the slots, as the usage of a router; None is even.
        prefetch: whether `link` reads ahead, and is right.
        training: whether there is a backward pass.

    Returns:
        The plan.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: one is out of range.
        RuntimeError: usage has another shape.

    Warns:
        UserWarning: reading does not hide behind computing.
    """
    check_kind("plan_offload", "experts", experts, Experts)
    check_at_least("plan_offload", "num_tokens", num_tokens, 1)
    check_among("plan_offload", "top_k", top_k, experts.num_experts)
    check_at_least("plan_offload", "budget", budget, 1)
    check_positive("plan_offload", "bandwidth", bandwidth)
    check_positive("plan_offload", "flops", flops)
    check_positive("plan_offload", "memory_bandwidth", memory_bandwidth)
    check_not_negative("plan_offload", "overhead", overhead)
    check_at_least("plan_offload", "num_layers", num_layers, 1)
    check_flag("plan_offload", "prefetch", prefetch)
    check_flag("plan_offload", "training", training)
    _check_part("overlap", overlap)
    if hit_rate is not None:
        _check_part("hit_rate", hit_rate)
    needed = _needed(experts.num_experts, num_tokens, top_k, usage)
    expert_bytes, window_bytes = stored_sizes("plan_offload", experts)
    num_slots = max(0, budget - window_bytes) // expert_bytes
    count = sum(needed)
    if hit_rate is None:
        hit_rate = sum(sorted(needed, reverse=True)[:num_slots]) / count
    read = expert_bytes / bandwidth
    rows = num_tokens * top_k / count
    compute = expert_bytes / memory_bandwidth + rows * _operations(experts) / flops

    one = _Call(count, read, compute, overhead, overlap)
    passes = 2 if training else 1
    num_linked = passes * (num_layers - 1) if prefetch else 0
    num_alone = passes * num_layers - num_linked
    missed = count * (1 - hit_rate)
    step_time = num_alone * one.alone(missed) + num_linked * one.linked(missed)
    break_even = one.break_even_linked() if num_linked else one.break_even_alone()
    fits = num_slots >= 1
    calls = passes * num_layers
    plan = OffloadPlan(
        step_time=step_time if fits else math.inf,
        load_time=calls * missed * read if fits else math.inf,
        compute_time=calls * one.compute_time,
        break_even_hit_rate=break_even,
        fits=fits,
        hit_rate=float(hit_rate),
    )
    if fits and hit_rate < break_even:
        warnings.warn(
            f"plan_offload: reading takes {1e3 * plan.load_time:.3g} ms of a step that computes "
            f"for {1e3 * plan.compute_time:.3g} ms; it would hide from a hit rate of "
            f"{break_even:.3f} on, got {hit_rate:.3f}",
            stacklevel=2,
        )
    return plan


def measure_machine(experts: Experts, *, folder: str | os.PathLike[str] | None = None) -> Machine:
    """Measures what `plan_offload` needs, in seconds, with as many threads as torch has now.

    It makes experts of the same sizes, 256 MiB of them but at least 2 and at most 256, writes them
    to a file that it removes, and times reading and computing. So many do not fit into a
    processor's caches, as those of all layers do not. Anything else that runs meanwhile makes the
    machine look slower.

    Args:
        experts: their sizes, dtype and number; the meta device is enough.
        folder: on the disk that the store is, or will be, on; None: the folder for temporary files.

    Returns:
        The numbers.

    Raises:
        TypeError: an argument is of another kind.
        OSError: the file cannot be written or read.
    """
    check_kind("measure_machine", "experts", experts, Experts)
    if not isinstance(folder, str | os.PathLike | None):
        raise TypeError(f"measure_machine: folder must be a path or None, got {shown(folder)}")
    expert_bytes, _ = stored_sizes("measure_machine", experts)
    count = max(2, min(SAMPLE // expert_bytes, MOST))
    with torch.random.fork_rng(devices=[]):  # the caller's numbers stay what they would be
        sample = _like(experts, count)
        few, many = _of_op(sample, 1), _of_op(sample, MANY_ROWS)
        few_seconds, many_seconds = _seconds(few) / count, _seconds(many) / count
        with tempfile.TemporaryDirectory(prefix="torchmoe-offload-", dir=folder) as made:
            read = _of_reading(os.path.join(made, "experts.safetensors"), sample)
            read_seconds = _seconds(read) / count
            overlap = _overlap(read, many, read_seconds / many_seconds)
            overhead = _overhead(os.path.join(made, "tiny.safetensors"), experts.num_experts)
    # Two equations for the two terms of c.
    per_row = max(many_seconds - few_seconds, 0.1 * many_seconds) / (MANY_ROWS - 1)
    of_memory = max(few_seconds - per_row, 0.1 * few_seconds)
    return Machine(
        bandwidth=expert_bytes / read_seconds,
        flops=_operations(experts) / per_row,
        memory_bandwidth=expert_bytes / of_memory,
        overhead=overhead,
        overlap=overlap,
    )


class _Call(NamedTuple):
    """One layer's call: what `plan_offload` calls n, l, c, overhead and overlap."""

    needed: float
    read: float
    compute: float
    overhead: float
    overlap: float

    @property
    def compute_time(self) -> float:
        """Without a read."""
        return self.overhead + self.needed * self.compute

    def alone(self, missed: float) -> float:
        """With `missed` reads, which only this call's computing hides."""
        if missed < 1:  # one call in 1 / missed reads one expert
            return (1 - missed) * self.compute_time + missed * self.alone(1)
        work = self.needed * self.compute
        last, first = missed * self.read + self.compute, self.read + missed * self.compute
        return self._mixed(missed, self.overhead + max(work, last, first))

    def linked(self, missed: float) -> float:
        """With reads that the layer before hides."""
        return self._mixed(missed, max(self.compute_time, missed * self.read))

    def _mixed(self, missed: float, at_once: float) -> float:
        """Part of the work at once, the rest one after the other."""
        in_turn = self.compute_time + missed * self.read
        return self.overlap * at_once + (1 - self.overlap) * in_turn

    def break_even_alone(self) -> float:
        """The hit rate from which `alone` is the time of computing, if all overlaps."""
        work = self.needed * self.compute
        missed = min((work - self.compute) / self.read, (work - self.read) / self.compute)
        return 1 - min(missed, self.needed) / self.needed if missed >= 1 else 1.0

    def break_even_linked(self) -> float:
        """The hit rate from which `linked` is the time of computing, if all overlaps."""
        return max(0.0, 1 - self.compute_time / (self.needed * self.read))


def _check_part(argument: str, value: float) -> None:
    check_number("plan_offload", argument, value)
    if not 0 <= value <= 1:
        raise ValueError(f"plan_offload: {argument} must be in [0, 1], got {value}")


def _needed(num_experts: int, num_tokens: int, top_k: int, usage: Tensor | None) -> list[float]:
    """How likely each expert is needed by a call."""
    if usage is None:
        shares = [1 / num_experts] * num_experts
    else:
        check_counts("plan_offload", "usage", usage, num_experts, torch.device("cpu"))
        total = float(usage.sum(dtype=torch.float64))
        if total == 0:
            raise ValueError("plan_offload: usage must have a share above 0, got none")
        shares = [share / total for share in usage.tolist()]
    return [1 - (1 - min(1.0, top_k * share)) ** num_tokens for share in shares]


def _operations(experts: Experts) -> int:
    """Floating-point operations of one row of an expert, forward."""
    inner = experts.intermediate_size * (3 if experts.activation in ops.GATED_ACTIVATIONS else 2)
    return 2 * experts.hidden_size * inner


def _like(experts: Experts, count: int) -> Experts:
    """Frozen experts of the same sizes, on the CPU."""
    return Experts(
        experts.hidden_size,
        experts.intermediate_size,
        count,
        activation=experts.activation,
        bias=experts.down_proj_bias is not None,
        device="cpu",
        dtype=experts.down_proj.dtype,
    ).requires_grad_(False)


def _of_op(experts: Experts, rows: int) -> Callable[[], object]:
    """A call that gives each expert so many rows."""
    count = experts.num_experts
    x = torch.randn(count * rows, experts.hidden_size).to(experts.down_proj.dtype)
    indices = (torch.arange(count * rows) % count).unsqueeze(1)
    weights = torch.ones(count * rows, 1)

    def run() -> None:
        with torch.inference_mode():
            experts(x, indices, weights)

    return run


def _of_reading(path: str, experts: Experts) -> Callable[[], object]:
    """Reads all experts from a file of them, in an order that a disk cannot guess."""
    write_store(path, experts)
    store = ExpertStore.open(path, experts)
    order = torch.randperm(experts.num_experts).tolist()
    tensors = {name: parameter.detach() for name, parameter in experts.named_parameters()}

    def run() -> None:
        for expert in order:
            # What is there already, so that the experts stay what they are.
            store.read(expert, {name: tensor[expert] for name, tensor in tensors.items()})

    return run


def _overlap(read: Callable[[], object], compute: Callable[[], object], ratio: float) -> float:
    """How much of two works goes on at once, one in a thread of its own.

    Args:
        read: takes `ratio` times as long as `compute`.
        compute: as it says.
        ratio: is evened out by repeating the shorter one.
    """

    def reading() -> None:
        for _ in range(max(1, round(1 / ratio))):
            read()

    def computing() -> None:
        for _ in range(max(1, round(ratio))):
            compute()

    def both() -> None:
        thread = threading.Thread(target=reading)
        thread.start()
        computing()
        thread.join()

    parts = _seconds(reading), _seconds(computing)
    return min(1.0, max(0.0, (sum(parts) - _seconds(both)) / min(parts)))


def _overhead(path: str, num_experts: int) -> float:
    """Seconds of a call that computes next to nothing and finds it resident."""
    tiny = Experts(8, 8, num_experts).requires_grad_(False)
    expert_bytes, window_bytes = stored_sizes("measure_machine", tiny)
    offloaded = offload(tiny, budget=num_experts * expert_bytes + window_bytes, store=path)
    offloaded.warm(torch.ones(num_experts))
    x, indices, weights = torch.randn(1, 8), torch.tensor([[0, -1]]), torch.ones(1, 2)
    with torch.inference_mode():
        return _seconds(lambda: [offloaded(x, indices, weights) for _ in range(20)]) / 20


def _seconds(call: Callable[[], object]) -> float:
    """Of the median round, after one that does not count."""
    call()
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
