"""The common base of the layer's parts as modules, and their training mode."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn

from torchmoe._checks import Attribute


class Part(nn.Module):
    """Base class of the parts.

    Settings are checked whenever they are set. torch.jit.script refuses a model that has such a
    part, with an error that says what to do instead.
    """

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401 (torch's own)
        # torch would make a module or a parameter a part of this one, whatever the name stands for.
        if isinstance(inspect.getattr_static(type(self), name, None), Attribute | property):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    # torch.jit.script calls it for a model and every module inside before it compiles one.
    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            "torch.jit.script: the model must have no part of torchmoe, which TorchScript cannot "
            f"compile, got {type(self).__name__}; use torch.compile or torch.export"
        )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Takes a module and those inside it out of training mode for a while.

    Each of them that trained before does so afterwards, also after an exception. `train` and `eval`
    are not called, which a module may have put something of its own into.
    """
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
