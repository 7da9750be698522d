"""Splits the time of a training step of examples/train_lm.py over the parts of the program.

torch.profiler records what runs; the parts that the program consists of are named in the record
while it is made. A moment of a step belongs to the innermost part or torchmoe op that it lies in,
in the backward pass to the one whose forward pass made that node of the graph. What no part claims
is "the rest", so that the parts add up to the step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from training import batches
from training.job import Job

SCOPE = "part: "  # begins a part's name in the record
OP = "torchmoe::"  # begins an op's; "torchmoe::_" that of a step inside of one
NODE = "autograd::engine::evaluate_function"  # begins that of a node of the graph
STEP, BACKWARD = "step", "backward"  # a whole step and its backward pass, in the record only

DATA = "data, seeds"
ENDS = "embedding, head, loss"
ATTENTION = "attention, norms, residuals"
OP_ROW = "experts' layer: "
LAYER = OP_ROW + "the rest"
STORE = "storing gradients"
NORM = "gradient clipping"
OPTIMIZER = "optimizer"
REST = "the rest"
ORDER = (DATA, ENDS, ATTENTION, OP_ROW, LAYER, STORE, NORM, OPTIMIZER, REST)


@dataclass
class PartTime:
    """Milliseconds of a step in one part."""

    part: str
    other_ms: float = 0.0
    """Forward, or what is neither."""
    backward_ms: float = 0.0

    @property
    def ms(self) -> float:
        """Both together."""
        return self.other_ms + self.backward_ms

    @property
    def in_model(self) -> bool:
        """Whether it has a forward and a backward pass."""
        return self.part in (ENDS, ATTENTION) or self.part.startswith(OP_ROW)


def profile_steps(job: Job, step: Callable[[], object], count: int) -> list[PartTime]:
    """The mean step of `count`; `step` makes one of the job's."""
    with named_parts(job):
        named_step = in_part(step, STEP)
        with profile(activities=[ProfilerActivity.CPU]) as record:
            for _ in range(count):
                named_step()
    return split(record.events(), count)


@contextmanager
def named_parts(job: Job) -> Iterator[None]:
    """Names the program's parts in whatever is recorded meanwhile."""
    model = job.model
    parts: list[tuple[object, str, str]] = [
        (batches, "next_batch", DATA),
        (torch, "manual_seed", DATA),
        (model, "loss_per_row", ENDS),
        *((module, "forward", ENDS) for module in (model.embedding, model.norm, model.head)),
        *((block, "forward", ATTENTION) for block in model.get_submodule("blocks").children()),
        *((moe, "forward", LAYER) for moe in model.moes),
        (model, "update", LAYER),
        (torch.Tensor, "backward", BACKWARD),
        (torch.nn.utils, "clip_grad_norm_", NORM),
        (job.optimizer, "step", OPTIMIZER),
        (job.optimizer, "zero_grad", OPTIMIZER),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, part in parts:
            replacement = in_part(getattr(owner, name), part)
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def in_part(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    """The function, recorded as this part."""

    @wraps(function)
    def recorded(*args: object, **named: object) -> object:
        with record_function(SCOPE + part):
            return function(*args, **named)

    return recorded


def split(events: Iterable[FunctionEvent], count: int) -> list[PartTime]:
    """The mean step's time by part, in the order of ORDER and of a layer's ops."""
    times: dict[str, PartTime] = {}
    places: dict[int, tuple[str, bool] | None] = {}  # by event
    makers: dict[int, str] = {}  # by a node's number: the part whose forward pass made it
    for event in sorted(events, key=lambda event: event.time_range.start):  # parents come first
        parent = event.cpu_parent
        above = None if parent is None else places[parent.id]
        places[event.id] = place = place_of(event, above, makers)
        if place is None:
            continue
        part, is_backward = place
        # Of those that start with the same number, the last makes the node: the next has the next.
        if event.sequence_nr >= 0 and not is_backward:
            makers[event.sequence_nr] = part
        time = times.setdefault(part, PartTime(part))
        ms = event.self_cpu_time_total / 1e3 / count
        if is_backward:
            time.backward_ms += ms
        else:
            time.other_ms += ms
    return sorted(times.values(), key=place_in_order)


def place_of(
    event: FunctionEvent, above: tuple[str, bool] | None, makers: dict[int, str]
) -> tuple[str, bool] | None:
    """Its part and if it is in the backward pass, None outside of steps; `above` its parent's."""
    name = event.name
    if name == SCOPE + STEP:
        return REST, False
    if above is None:
        return None
    if name == SCOPE + BACKWARD:
        return REST, True
    if name.startswith(SCOPE):
        return name.removeprefix(SCOPE), above[1]
    if name.startswith(OP) and not name.startswith(OP + "_"):
        return OP_ROW + name.removeprefix(OP), above[1]
    if name.startswith(NODE):
        return STORE if "AccumulateGrad" in name else makers.get(event.sequence_nr, REST), True
    return above


def place_in_order(time: PartTime) -> int:
    """Where a part stands in ORDER; all ops stand in one place."""
    is_op = time.part.startswith(OP_ROW) and time.part != LAYER
    return ORDER.index(OP_ROW if is_op else time.part)
