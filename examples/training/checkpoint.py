"""Checkpoints: tensors as safetensors, with JSON in the header of the same file. Never pickle.

One file holds all that a run needs to go on: weights, buffers, the optimizer's state, settings and
progress. There is no random state and no place in the data to save: each step draws from a seed
made of --seed and the step's number. A hash over everything tells a damaged file from a whole one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from training import run_folder
from training.settings import Settings

PROGRAM = "torchmoe-byte-lm-"
FORMAT = f"{PROGRAM}5"
KEPT = 2  # the last ones; a new one is complete before an old one goes
NAME = re.compile(r"step-(\d{8,})\.safetensors")


class CheckpointError(ValueError):
    """The checkpoint cannot be read or written; the message says why in one line."""


@dataclass
class Progress:
    """How far a run is."""

    first_step: int = 0
    """Steps that the weights had when the run began."""
    step: int = 0
    """Steps that they have now."""
    bytes: int = 0
    """Bytes that the run trained on."""
    training_seconds: float = 0.0
    """Time in optimizer steps."""
    reporting_seconds: float = 0.0
    """Time in display and metrics."""
    saving_seconds: float = 0.0
    """Time in checkpoints and the held-out tests that go with them."""

    def count(self, byte_count: int) -> None:
        """One more step, on so many bytes."""
        self.step += 1
        self.bytes += byte_count

    @property
    def seconds(self) -> float:
        """The whole time."""
        return self.training_seconds + self.reporting_seconds + self.saving_seconds


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read, whole and ours."""

    path: Path
    tensors: dict[str, Tensor]
    settings: Settings
    progress: Progress
    origin: dict[str, Any]


def path_of(folder: Path, step: int) -> Path:
    """The file of a step."""
    return folder / f"step-{step:08d}.safetensors"


def in_order(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    steps = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := NAME.fullmatch(path.name))
    }
    return [steps[step] for step in sorted(steps)]


def size_of(model: nn.Module) -> int:
    """Bytes of a checkpoint, or slightly more: weights and two moments of each."""
    weights: int = sum(tensor.nbytes for tensor in model.state_dict().values())
    return 3 * weights + (1 << 20)


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    progress: Progress,
    origin: dict[str, Any],
) -> Path:
    """Writes the checkpoint of this step, then removes all but the last KEPT."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= optimizer_tensors(optimizer)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    content = {
        "format": FORMAT,
        "settings": json.dumps(settings.to_dict()),
        "progress": json.dumps(asdict(progress)),
        "origin": json.dumps(origin),
    }
    data = serialize(tensors, {**content, "sha256": hash_of(content, tensors)})
    path = path_of(folder, progress.step)
    earlier = [other for other in in_order(folder) if other != path]
    try:
        try:
            run_folder.write(path, [data])
        except OSError as error:
            if error.errno != errno.ENOSPC or len(earlier) < KEPT:
                raise
            # The newest one stays; the one before it makes room for this one.
            earlier.pop(0).unlink()
            run_folder.write(path, [data])
        for old in earlier[: len(earlier) + 1 - KEPT]:
            old.unlink()
    except OSError as error:
        raise CheckpointError(f"--out: cannot write {path}: {error.strerror}") from error
    return path


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as optimizer.PARAMETER.KEY."""
    state = optimizer.state_dict()
    names = parameter_names(state["param_groups"])
    return {
        f"optimizer.{names[index]}.{key}": tensor
        for index, tensors in state["state"].items()
        for key, tensor in tensors.items()
    }


def parameter_names(groups: Iterable[dict[str, Any]]) -> list[str]:
    """The parameters' names in the order that an optimizer numbers them."""
    return [name for group in groups for name in group["param_names"]]


def hash_of(content: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over everything in the file, whatever its order there."""
    total = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def load(path: Path, option: str = "--load") -> Checkpoint:
    """Reads a checkpoint, or the newest one of a run's folder; all or nothing.

    Raises:
        CheckpointError: there is none, or it is damaged or another program's; `option` is named.
    """
    if path.is_dir():
        found = [*in_order(path), *in_order(run_folder.RunFolder(path).checkpoints)]
        if not found:
            raise CheckpointError(f"{option}: {path} holds no checkpoint")
        path = found[-1]
    try:
        with safe_open(path, "pt") as file:
            content = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"{option}: {path}: no such file") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{option}: {path} is not a safetensors file, or a damaged one: {error}"
        ) from error
    form = content.get("format", "")
    if not form.startswith(PROGRAM):
        raise CheckpointError(f"{option}: {path} is not a checkpoint of this program")
    if form != FORMAT:
        raise CheckpointError(f"{option}: {path} is of another version of this program")
    if content.pop("sha256", None) != hash_of(content, tensors):
        raise CheckpointError(f"{option}: {path} is damaged: its content does not match its hash")
    try:
        settings = Settings.from_dict(json.loads(content["settings"]))
        progress = read_progress(json.loads(content["progress"]))
        origin = dict(json.loads(content["origin"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{option}: {path} has damaged settings: {error}") from error
    return Checkpoint(path, with_temperature_vectors(tensors), settings, progress, origin)


def with_temperature_vectors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with a CosineRouter's temperature and its moments as vectors of one number.

    They are scalars in older files; the optimizer's step is one still.
    """
    return {
        name: tensor.reshape(1)
        if ".log_temperature" in name and not name.endswith(".step")
        else tensor
        for name, tensor in tensors.items()
    }


def read_progress(values: object) -> Progress:
    """The progress that was saved."""
    kinds = {item.name: type(item.default) for item in fields(Progress)}
    if not isinstance(values, dict) or {n: type(v) for n, v in values.items()} != kinds:
        raise ValueError(f"progress must be numbers by name, got {values!r}")
    if min(values.values()) < 0:
        raise ValueError(f"progress must be at least 0, got {values!r}")
    return Progress(**values)


def restore_model(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Puts the weights and buffers into a model of the checkpoint's dtype.

    The names, shapes and dtypes of all that the file holds are compared before anything is copied.
    """
    weights = model.state_dict()
    expected = {f"model.{name}": (t.shape, t.dtype) for name, t in weights.items()}
    if checkpoint.progress.step > checkpoint.progress.first_step:
        for name, parameter in model.named_parameters():
            moment = parameter.shape, parameter.dtype
            expected[f"optimizer.{name}.step"] = torch.Size(), torch.float32
            expected[f"optimizer.{name}.exp_avg"] = moment
            expected[f"optimizer.{name}.exp_avg_sq"] = moment
    if {name: (t.shape, t.dtype) for name, t in checkpoint.tensors.items()} != expected:
        raise CheckpointError(f"{checkpoint.path} holds other tensors than its settings ask for")
    model.load_state_dict({name: checkpoint.tensors[f"model.{name}"] for name in weights})


def restore_optimizer(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> None:
    """Puts the state into the optimizer of a model that restore_model accepted."""
    state = optimizer.state_dict()
    for index, name in enumerate(parameter_names(state["param_groups"])):
        prefix = f"optimizer.{name}."
        tensors = {k: t for k, t in checkpoint.tensors.items() if k.startswith(prefix)}
        if tensors:  # there are none before the first step
            state["state"][index] = {k.removeprefix(prefix): t for k, t in tensors.items()}
    optimizer.load_state_dict(state)
