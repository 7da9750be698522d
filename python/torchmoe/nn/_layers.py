"""The layers inside a model, what they are called, and hooks that follow them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchmoe.nn.moe import MoE

Model = TypeVar("Model", bound=nn.Module)
Work = TypeVar("Work", bound=Callable[..., Any])


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """Every MoE layer inside a model by its path, "moe" if the model is the layer.

    Layers are found anywhere, also inside WithAttachedLoss, DistributedDataParallel or a compiled
    model. What the last two add to a path is left out, so that a layer has the same name with and
    without them.
    """
    layers = {}
    wrapped = set()  # paths of what DistributedDataParallel holds
    for path, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            wrapped.add(f"{path}.module".lstrip("."))
        if isinstance(module, MoE):
            layers[_name(path, wrapped)] = module
    return layers


def untrained_copy(model: Model) -> Model:
    """A deep copy for experiments, whose layers do not warn that `update` is never called."""
    copied = copy.deepcopy(model)
    for layer in moe_layers(copied).values():
        layer._reminder.stop()
    return copied


def _name(path: str, wrapped: set[str]) -> str:
    parts = path.split(".")
    kept = [
        part
        for i, part in enumerate(parts)
        if part != "_orig_mod" and ".".join(parts[: i + 1]) not in wrapped
    ]
    return ".".join(kept) or "moe"


class InertHook:
    """What a hook becomes in a copy of the model, such as averaged weights or a pickled file."""

    def __call__(self, *args: object) -> None:
        """Does nothing."""


class Hook(Generic[Work]):
    """Base of hooks that follow one model, and not its copies.

    Args:
        work: what `run` does, outside any compiled graph: a compiler would compile counting code
            again for each count.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        # Wrapped here, since torch.compiler takes seconds to load.
        self._outside: Work = torch.compiler.disable(work)  # type: ignore[no-untyped-call]

    @property
    def run(self) -> Work:
        """The work. Without a compiler the wrapper would cost half as much as watching does."""
        return self._outside if torch.compiler.is_compiling() else self._work

    def __reduce__(self) -> tuple[type[InertHook], tuple[()]]:
        return InertHook, ()
