"""Runs of the language model to compare: their settings, their end, the time of a step."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import train_lm
from training import checkpoint, corpus, metrics, program, run_folder
from training.batches import next_batch
from training.evaluation import bits_by_domain, held_out_windows
from training.job import open_folder
from training.metrics import Record
from training.parallel import ALONE
from training.report import HELD_OUT_WINDOWS
from training.run_folder import FolderError, RunFolder
from training.settings import Settings, SettingsError, flag, new_run, resumed_run, with_config

TUNING_SHARE = 0.1  # of the run, at its end, whose training loss decides
TIMED_ROUNDS, TIMED_STEPS = 9, 10
KEPT = "outcome.json"  # in the folder of a run that is over


@dataclass(frozen=True)
class Outcome:
    """One finished run."""

    settings: Settings
    records: list[Record]
    held_out: float  # bits per byte, mean of the domains
    parameters: int
    active_parameters: int

    @property
    def tuning_loss(self) -> float:
        """Bits per byte of training text over the end of the run."""
        last = self.records[-1].step
        end = [record for record in self.records if record.step > (1 - TUNING_SHARE) * last]
        return statistics.fmean(record.loss for record in end)

    @property
    def seconds(self) -> float:
        """Time in optimizer steps."""
        return self.records[-1].training_seconds


def common_settings(
    defaults: Settings, given: Mapping[str, Any], settled: Iterable[str]
) -> Settings:
    """What all runs of a comparison have in common.

    Args:
        defaults: of the comparison.
        given: by the user, by name.
        settled: names of settings that the comparison chooses itself.

    Raises:
        SettingsError: one of those was given, or there is nothing to train.
    """
    given = with_config(given)
    for name in settled:
        if name in given:
            raise SettingsError(f"{flag(name)} is not to be given: the comparison chooses it")
    common = new_run(defaults, given)
    if not common.steps:
        raise SettingsError(f"--steps must be at least 1, got {common.steps}")
    train_lm.check(common)
    program.check_device(common)
    return common


def checked(settings: Settings) -> Settings:
    """The settings of one kind of model, which are not the common ones.

    Raises:
        SettingsError: there is no such model.
    """
    settings.check()
    train_lm.check(settings)
    return settings


def trained(settings: Settings, text: corpus.Text) -> Outcome:
    """The run with these settings, trained to its end; one that was begun before goes on.

    What is left of a run that is over are its records and its outcome, without the weights.
    """
    folder = RunFolder(Path(settings.out))
    with contextlib.ExitStack() as stack:
        stack.enter_context(run_folder.locked(folder.path))
        before = kept(settings, text)
        if before is not None:
            return before
        folder.make()
        log = stack.enter_context((folder.path / "log.txt").open("a"))
        stack.enter_context(contextlib.redirect_stdout(log))
        settings, start, resumes = program.choose_settings({**settings.to_dict(), "resume": True})
        job = train_lm.new_job(settings, start, resumes, ALONE)
        open_folder(folder, job, text, start if resumes else None)
        if job.share < 1 and train_lm.train(job, text, folder, ALONE):
            raise KeyboardInterrupt
        windows = held_out_windows(text.held_out, settings.context, HELD_OUT_WINDOWS)
        held_out = statistics.fmean(bits_by_domain(job.model, windows, settings.rows).values())
        parameters, active_parameters = job.model.count_parameters()
        content = {
            "settings": settings.to_dict(),
            "held_out": held_out,
            "parameters": parameters,
            "active_parameters": active_parameters,
            **job.origin,
        }
        run_folder.write_json(folder.path / KEPT, content)
        for path in checkpoint.in_order(folder.checkpoints):
            path.unlink()  # hundreds of megabytes for each of many runs
    return Outcome(settings, metrics.read(folder), held_out, parameters, active_parameters)


def kept(settings: Settings, text: corpus.Text) -> Outcome | None:
    """The outcome of the run with these settings if it is over.

    Raises:
        SettingsError: it has other settings.
        CorpusError: it has read another text.
        FolderError: what is kept of it cannot be read.
    """
    path = Path(settings.out) / KEPT
    try:
        content = json.loads(path.read_bytes())
        saved = Settings.from_dict(content["settings"])
        numbers = content["held_out"], content["parameters"], content["active_parameters"]
        text_sha256 = content["text_sha256"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise FolderError(f"--out: {path} is not what a run left: {error}") from error
    settings = resumed_run(saved, settings.to_dict())
    if text_sha256 != text.sha256():
        raise corpus.CorpusError(
            f"--data: the text is not the one that {path.parent} was trained on"
        )
    return Outcome(settings, metrics.read(RunFolder(path.parent)), *numbers)


def step_seconds(kinds: Mapping[str, Settings], text: corpus.Text) -> dict[str, float]:
    """The least time of an optimizer step of each kind of model."""
    return {name: min(rounds) for name, rounds in step_rounds(kinds, text).items()}


def step_rounds(kinds: Mapping[str, Settings], text: corpus.Text) -> dict[str, list[float]]:
    """The seconds of an optimizer step of each kind of model, the mean of each round of steps.

    They take turns, so that what else the machine does meets them all alike.
    """
    jobs = {name: train_lm.new_job(some) for name, some in kinds.items()}
    learners = {name: job.learner for name, job in jobs.items()}
    rounds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(TIMED_ROUNDS):
        for name, job in jobs.items():
            job.model.train()
            start = time.perf_counter()
            for _ in range(TIMED_STEPS):
                batch = next_batch(text, job.progress.step, job.settings, ALONE)
                train_lm.optimizer_step(job, learners[name], batch, job.settings.lr, ALONE)
            rounds[name].append((time.perf_counter() - start) / TIMED_STEPS)
    return rounds
