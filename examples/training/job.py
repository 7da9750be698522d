"""What moves while a run trains, and how a run begins: new, from a checkpoint, or resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

import torchmoe
from training import checkpoint, run_folder
from training.checkpoint import Checkpoint, Progress
from training.corpus import CorpusError, Text
from training.language_model import LanguageModel
from training.parallel import Processes
from training.run_folder import RunFolder
from training.settings import TORCH_DTYPES, Settings, SettingsError


@dataclass
class Job:
    """What moves while a run trains."""

    settings: Settings
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    progress: Progress
    watcher: torchmoe.Watcher | None
    """Follows the experts while the run trains; None of a dense model."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What computes and what it reads, once the run has its folder; part of its checkpoints."""

    @property
    def learner(self) -> nn.Module:
        """The model as it trains: compiled where the settings say so, for one shape of batches.

        Held-out tests and samples use the model as it is.
        """
        if self.settings.compile:
            return cast(nn.Module, torch.compile(self.model))
        return self.model

    def save(self, folder: RunFolder) -> None:
        """Writes the checkpoint of this step."""
        checkpoint.save(
            folder.checkpoints,
            self.model,
            self.optimizer,
            self.settings,
            self.progress,
            self.origin,
        )

    @property
    def steps_done(self) -> int:
        """Optimizer steps that this run has taken."""
        return self.progress.step - self.progress.first_step

    @property
    def share(self) -> float:
        """Share of the run that is over, by steps or by the clock, whichever is further."""
        steps, minutes = self.settings.steps, self.settings.minutes
        by_steps = self.steps_done / steps if steps else 0.0
        by_clock = self.progress.seconds / (60 * minutes) if minutes else 0.0
        return max(by_steps, by_clock)


def begin(
    model: LanguageModel,
    make_optimizer: Callable[[LanguageModel, float], torch.optim.Optimizer],
    settings: Settings,
    start: Checkpoint | None,
    resumes: bool,
    group: Processes,
) -> Job:
    """A model and its optimizer where they compute, as a checkpoint has them where there is one.

    Args:
        model: new, on the CPU, in float32.
        make_optimizer: from the model and the learning rate.
        settings: of the run.
        start: the checkpoint that the run begins from, if any.
        resumes: whether it goes on with that run, optimizer and progress included.
        group: the processes that train together.

    Raises:
        SettingsError: the batch cannot be shared among the processes.
        CheckpointError: the checkpoint is not of such a model.
    """
    if settings.rows % group.count:
        raise SettingsError(
            f"--batch-tokens must give every process as many windows, got {settings.rows} windows "
            f"for {group.count} processes"
        )
    progress = Progress()
    if start is not None:
        model.to(TORCH_DTYPES[start.settings.dtype])
        checkpoint.restore_model(start, model)
        progress = Progress(first_step=start.progress.step, step=start.progress.step)
    model.to(group.device(settings.device), TORCH_DTYPES[settings.dtype])
    optimizer = make_optimizer(model, settings.lr)
    if start is not None and resumes:
        checkpoint.restore_optimizer(start, optimizer)
        progress = start.progress
    watcher = torchmoe.watch(model) if model.moes else None
    if watcher is not None:
        watcher.close()  # until training begins
    return Job(settings, model, optimizer, progress, watcher)


def open_folder(folder: RunFolder, job: Job, text: Text, resumed: Checkpoint | None) -> None:
    """Makes the folder this run's; from here on there is a checkpoint to resume from.

    Raises:
        CorpusError: the text is no longer the one that the resumed run reads.
    """
    job.origin = {**run_folder.origin(), "text_sha256": text.sha256()}
    if resumed is not None and resumed.origin.get("text_sha256") != job.origin["text_sha256"]:
        raise CorpusError(
            f"--resume: the text is not the one that {resumed.path} was trained on; "
            "--load starts a new run from its weights"
        )
    folder.check_room(checkpoint.size_of(job.model), resumes=resumed is not None)
    if resumed is not None:
        return
    aside = folder.set_aside()
    if aside is not None:
        print(f"the files of an earlier run are in {aside} now")
    run_folder.write_json(folder.run, {"settings": job.settings.to_dict(), **job.origin})
    job.save(folder)
