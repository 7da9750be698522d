"""Ways to copy a module through bytes."""

from __future__ import annotations

import io
import pickle
from typing import TypeVar

import torch
from torch import nn

Copied = TypeVar("Copied", bound=nn.Module)


def by_pickle(module: Copied) -> Copied:
    return pickle.loads(pickle.dumps(module))


def load_state(other: Copied, module: nn.Module) -> Copied:
    """The other module with the state of this one, by way of a file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other
