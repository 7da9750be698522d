"""The common base of the layer's parts as modules."""

from __future__ import annotations

import inspect
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
