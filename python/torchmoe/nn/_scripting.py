"""What the layer's parts say to TorchScript."""

from __future__ import annotations

from typing import NoReturn

from torch import nn


class Unscriptable(nn.Module):
    """Base class of the parts; torch.jit.script refuses a model that has one, with the way out."""

    # torch.jit.script calls it for a model and every module inside before it compiles one.
    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            "torch.jit.script: the model must have no part of torchmoe, which TorchScript cannot "
            f"compile, got {type(self).__name__}; use torch.compile or torch.export"
        )
