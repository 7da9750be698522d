"""Checkpoints: the weights as safetensors, the settings as JSON in the same file. Never pickle."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from lm.settings import Settings

FORMAT = "torchmoe-byte-lm-1"


class CheckpointError(ValueError):
    """The checkpoint cannot be read or written; the message says why in one line."""


def check_writable(path: Path) -> None:
    """Makes the folder and proves that a file can be written there, before the work is done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise CheckpointError(f"--out: cannot write to {path.parent}: {error.strerror}") from error


def save(path: Path, tensors: dict[str, Tensor], settings: Settings, steps_done: int) -> None:
    """Writes the file whole or not at all: to a neighbour first, then renamed."""
    metadata = {
        "format": FORMAT,
        "settings": settings.to_json(),
        "steps_done": str(steps_done),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(serialize(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"--out: cannot write {path}: {error.strerror}") from error


def load(path: Path) -> tuple[dict[str, Tensor], Settings, int]:
    """The weights, the settings and the number of steps, all checked to be ours and whole."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"--load: {path}: no such file") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"--load: {path} is not a safetensors file, or a damaged one: {error}"
        ) from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"--load: {path} is not a checkpoint of this program")
    try:
        settings = Settings.from_json(metadata["settings"])
        return tensors, settings, int(metadata["steps_done"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"--load: {path} has damaged settings: {error}") from error


def fill(model: nn.Module, tensors: dict[str, Tensor], path: str) -> None:
    """Puts the weights into the model, all of them or none."""
    expected = model.state_dict()
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != {name: tensor.shape for name, tensor in expected.items()}:
        raise CheckpointError(f"--load: {path} holds other weights than its settings ask for")
    model.load_state_dict(tensors)
