"""Which activation checkpoints are active around a call, and which one recomputes it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Hashable, Iterator
from types import FrameType, GeneratorType
from typing import Any, NamedTuple, cast

import torch
import torch.utils.checkpoint
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import _CheckpointFrame


class Recomputation(NamedTuple):
    """One run of a checkpoint's function in the backward pass."""

    checkpoint: object
    """What `Surroundings.forward` held in the forward pass."""
    run: Hashable
    """The same in one run, another one in a second backward pass."""


class Surroundings(NamedTuple):
    """The checkpoints around a call."""

    forward: list[object]
    """Those whose forward pass is running, inside of what is recomputed where something is.

    Each is an object that lives as long as the graph and can be referred to weakly.
    """
    recomputation: Recomputation | None
    """The innermost one."""


def surroundings() -> Surroundings:
    """The checkpoints around the function that calls this one.

    They are found on Python's stack, the one place which says in what order those of either kind
    lie in each other: torch.utils.checkpoint.checkpoint without reentrant autograd, and every
    torch.autograd.Function with a ctx that runs a model in its forward and again in its backward,
    as torch's reentrant checkpoint and those of other libraries do.
    """
    forward: list[object] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        for checkpoint, run in (*_without_reentry(frame), *_of_function(frame)):
            if run is not None:
                return Surroundings(forward, Recomputation(checkpoint, run))
            forward.append(checkpoint)
        frame = frame.f_back
    return Surroundings(forward, None)


def _without_reentry(frame: FrameType) -> Iterator[tuple[object, Hashable | None]]:
    """The checkpoint without reentrant autograd that is at work in the frame."""
    if frame.f_globals is not vars(torch.utils.checkpoint):
        return
    variables = frame.f_locals
    for value in variables.values():
        if isinstance(value, _CheckpointFrame):
            # Outside of a backward pass there is no task, but a number that torch draws.
            yield value, cast(Hashable, variables.get("gid", _task()))
        elif isinstance(value, GeneratorType):
            # What comes before and after the forward pass is a generator that waits meanwhile.
            for inner in inspect.getgeneratorlocals(value).values():
                if isinstance(inner, _CheckpointFrame):
                    yield inner, None


def _of_function(frame: FrameType) -> Iterator[tuple[object, Hashable | None]]:
    """The ctx of the torch.autograd.Function that is at work in the frame."""
    code = frame.f_code
    # The variables of a frame are looked at only where it may be one: looking keeps them alive.
    if code.co_name in ("forward", "backward") and code.co_argcount > 0:
        first = code.co_varnames[0]
        if first != "self" and isinstance(ctx := cast(Any, frame.f_locals.get(first)), FunctionCtx):
            yield ctx, None if code.co_name == "forward" else _task()


def in_backward() -> bool:
    """Whether autograd is computing gradients, as while activation checkpointing recomputes."""
    return _task() != -1


def _task() -> int:
    return torch._C._current_graph_task_id()
