"""Runs that do not depend on each other, some at a time, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from studies.common.outcome import Outcome, kept, trained
from training import corpus
from training.program import USER_ERRORS, set_threads
from training.settings import Settings
from training.terminal import asked_to_stop

POLL_SECONDS = 0.2  # from one look at whether to stop to the next


class RunError(Exception):
    """A run failed; the message says which and why in one line."""


@dataclass(frozen=True)
class Workers:
    """Processes that train."""

    count: int
    executor: ProcessPoolExecutor


@contextmanager
def workers(count: int) -> Iterator[Workers]:
    """Processes for as long as the block: each is begun when a run needs it, and reads a text once.

    Where the block fails, a run at work saves a checkpoint and ends.
    """
    with ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), follow_parent
    ) as executor:
        try:
            yield Workers(count, executor)
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()  # which lets a run save a checkpoint first
            raise


def train_all(
    runs: Mapping[str, Settings], some: Workers, finished: Callable[[str, Outcome], None]
) -> dict[str, Outcome]:
    """Trains all runs to their end, as many at a time as there are workers.

    Args:
        runs: by name, begun in this order.
        some: who train.
        finished: is told of each run as it ends.

    Returns:
        Their outcomes in the same order.

    Raises:
        RunError: one failed.
        KeyboardInterrupt: somebody asked to stop.
    """
    outcomes = finished_before(runs, finished)
    waiting = [name for name in runs if name not in outcomes]
    at_work: dict[Future[Outcome], str] = {}
    with asked_to_stop() as stopped:
        while waiting or at_work:
            # None more than can be at work, since one that a process awaits cannot be taken back.
            while waiting and len(at_work) < some.count:
                name = waiting.pop(0)
                with ctrl_c_held():
                    at_work[some.executor.submit(train_one, runs[name])] = name
            done = wait(at_work, POLL_SECONDS, FIRST_COMPLETED).done
            if stopped:
                raise KeyboardInterrupt
            for future in done:
                name = at_work.pop(future)
                outcomes[name] = outcome_of(name, future)
                finished(name, outcomes[name])
    return {name: outcomes[name] for name in runs}


def finished_before(
    runs: Mapping[str, Settings], finished: Callable[[str, Outcome], None]
) -> dict[str, Outcome]:
    """The outcomes of those runs that are over, read here; a process for them would take longer.

    Raises:
        RunError: one cannot be read, or is not of these settings and this text.
    """
    outcomes = {}
    for name, settings in runs.items():
        try:
            before = kept(settings, load_text(settings.data))
        except USER_ERRORS as error:
            raise RunError(f"{name}: {error}") from error
        if before is not None:
            outcomes[name] = before
            finished(name, before)
    return outcomes


def outcome_of(name: str, future: Future[Outcome]) -> Outcome:
    """What a run that is over gave; raises RunError where that is an error."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise RunError(f"{name}: its process was ended from outside") from error
    except Exception as error:
        raise RunError(f"{name}: {error}") from error


def train_one(settings: Settings) -> Outcome:
    """One run; the traceback of an error that no user can mend goes to the run's log."""
    set_threads(settings)
    try:
        return trained(settings, load_text(settings.data))
    except KeyboardInterrupt:
        # The pool would go on with this process, and wait for it when all are to end.
        os._exit(130)
    except USER_ERRORS:
        raise
    except Exception as error:
        log = Path(settings.out) / "log.txt"
        with log.open("a") as file:
            traceback.print_exc(file=file)
        message = " ".join(str(error).split())
        raise RuntimeError(f"{type(error).__name__}: {message} (see {log})") from error


@cache
def load_text(data: tuple[str, ...]) -> corpus.Text:
    """The text, read once by each process."""
    return corpus.Text.load(list(data))


@contextmanager
def ctrl_c_held() -> Iterator[None]:
    """Ctrl-C waits until the end of the block; a process begun inside never sees it.

    A process keeps the mask that it is begun with, so that it leaves Ctrl-C to this one from its
    first moment on.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent() -> None:
    """Ends this process when the one that began it is over."""
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Waits for that, however it comes: a process left alone would work for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
