"""A training program around a model and its loop: command line, folder, checkpoints, report."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import torchmoe
from training import checkpoint, parallel, run_folder
from training.checkpoint import Checkpoint, CheckpointError
from training.corpus import CorpusError, Text
from training.job import Job, open_folder
from training.parallel import Processes
from training.report import report
from training.run_folder import FolderError, RunFolder
from training.settings import (
    Settings,
    SettingsError,
    make_parser,
    new_run,
    read_arguments,
    resumed_run,
    run_from,
    with_config,
)

USER_ERRORS = (SettingsError, CorpusError, CheckpointError, FolderError)


@dataclass(frozen=True)
class Program:
    """A program that trains."""

    name: str
    """Of its file."""
    about: str
    """What it does, for --help."""
    examples: str
    """Of its command line, for --help."""
    check: Callable[[Settings], None]
    """Raises SettingsError where the model cannot be what the settings ask for."""
    new_job: Callable[[Settings, Checkpoint | None, bool, Processes], Job]
    """From the settings, the checkpoint to start from, whether to resume it, and the processes."""
    train: Callable[[Job, Text, RunFolder, Processes], bool]
    """Trains to the end of the run; gives whether it was asked to stop before."""

    def main(self, arguments: list[str] | None = None) -> int:
        """Reads the command line, runs, and turns what the user can mend into one line."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a sample may hold what cannot be shown
        parser = make_parser(self.name, self.about, self.examples, Settings())
        given = read_arguments(parser, arguments)
        try:
            return self._run(given)
        except USER_ERRORS as error:
            parser.error(str(error))
        except KeyboardInterrupt:
            print("interrupted; what the last checkpoint holds is saved", file=sys.stderr)
            return 130

    def _run(self, given: dict[str, Any]) -> int:
        """The whole program: settings, text, model, training, and what it learned."""
        settings, start, resumes = choose_settings(given)
        self.check(settings)
        check_device(settings)
        set_threads(settings)
        torchmoe.keep_freed_memory()
        with parallel.processes(settings.device) as group, contextlib.ExitStack() as stack:
            if not group.leads:
                silence = stack.enter_context(Path(os.devnull).open("w"))
                stack.enter_context(contextlib.redirect_stdout(silence))
            folder = RunFolder(Path(settings.out))
            if settings.steps != 0 and group.leads:
                stack.enter_context(run_folder.locked(folder.path))
                folder.make()
            status = self._run_in(folder, settings, start, resumes, group)
            group.wait()  # none leaves while another still needs the group
            return status

    def _run_in(
        self,
        folder: RunFolder,
        settings: Settings,
        start: Checkpoint | None,
        resumes: bool,
        group: Processes,
    ) -> int:
        """The program in one of the processes that train together, with the folder in hand."""
        trains = settings.steps != 0

        # 1. Text, and a model with its optimizer, new or from a checkpoint.
        text = Text.load(list(settings.data))
        text.describe(settings.context)
        job = self.new_job(settings, start, resumes, group)
        describe(job, start)

        # 2. Training.
        if trains and group.leads:
            open_folder(folder, job, text, start if resumes else None)
        group.wait()
        watcher = None
        if trains and job.share < 1:
            watcher = job.watcher
            try:
                interrupted = self.train(job, text, folder, group)
            except OSError:  # what is printed has no place any more
                if group.leads:
                    job.save(folder)
                raise
            if interrupted:
                out = "" if settings.out == Settings().out else f" --out {settings.out}"
                print(
                    f"interrupted after {job.progress.step} steps; "
                    f"to go on, run with: --resume{out}"
                )
                return 130
        elif resumes:
            print(f"this run is over, after {job.progress.step} steps")
            if folder.results.exists():
                return 0

        # 3. What it learned.
        if group.leads:
            report(job.model, text, settings, job.progress, folder if trains else None, watcher)
        return 0


def choose_settings(given: dict[str, Any]) -> tuple[Settings, Checkpoint | None, bool]:
    """The run's settings, the checkpoint that it starts from, and whether it resumes that one."""
    given = with_config(given)
    resumes = given.pop("resume", False)
    if resumes:
        out = Path(given.get("out", Settings().out))
        if checkpoint.in_order(RunFolder(out).checkpoints):
            start = checkpoint.load(RunFolder(out).checkpoints, "--resume")
            given["out"] = str(out)  # the folder may have been moved
            return resumed_run(start.settings, given), start, True
        print(f"{out} holds no checkpoint to resume from: starting from the beginning")
    if given.get("load") is not None:
        start = checkpoint.load(Path(given["load"]))
        return run_from(start.settings, given), start, False
    return new_run(Settings(), given), None, False


def check_device(settings: Settings) -> None:
    """Raises SettingsError where the device is not there."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device: cuda must be there, but torch finds no GPU")
    if settings.device == "cuda" and torchmoe.build_info()["cuda"] == "none":
        raise SettingsError("--device: cuda needs a torchmoe with CUDA kernels, got a CPU build")


def set_threads(settings: Settings) -> None:
    """Threads as asked for; torchrun has set one per process where that was not asked."""
    if settings.threads:
        torch.set_num_threads(settings.threads)


def describe(job: Job, start: Checkpoint | None) -> None:
    """Prints what is going to be trained."""
    settings = job.settings
    if start is not None:
        print(f"from: {start.path}, {start.progress.step} steps")
    total, active = job.model.count_parameters()
    kind = "dense"
    if settings.feed_forward == "moe":
        kind = f"top {settings.top_k} of {settings.experts} experts"
    print(
        f"model: {settings.layers} layers, {kind}, {total:,} parameters, "
        f"{active:,} at work on a byte, {torch.get_num_threads()} threads"
    )
