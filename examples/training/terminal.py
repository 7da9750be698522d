"""What a program does about its terminal: closed pipes, full disks, Ctrl-C."""

from __future__ import annotations

import errno
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

# Within so many seconds a second Ctrl-C is the first one once more, from an impatient finger.
ONE_PRESS = 1.0
# What a stream's error says where a file's would name the file.
OF_A_STREAM = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a program and exits with its status, without a traceback for what users do.

    A reader that goes away, as `head` does, ends the program quietly with status 1, as Python's
    documentation of SIGPIPE has it. An output that cannot be written, such as one on a full disk,
    ends it with a line. Without any standard output it runs as ever.
    """
    _open_what_is_closed()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a script's background job
        signal.signal(signal.SIGINT, OnePress(signal.default_int_handler))
    status: int | str | None
    try:
        try:
            status = main()
        except SystemExit as end:
            status = end.code
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            status = 130
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        _discard_output()
        status = 1
    except OSError as error:
        if error.filename is not None or error.errno not in OF_A_STREAM:
            raise
        _discard_output()
        status = f"{program_name()}: cannot write what it prints: {error.strerror}"
    sys.exit(status)


def program_name() -> str:
    """What the user calls this program: its file, or `python -m` and the module."""
    spec = sys.modules["__main__"].__spec__
    return Path(sys.argv[0]).name if spec is None else f"python -m {spec.parent}"


def command_line() -> str:
    """The command that began this program."""
    return shlex.join([*program_name().split(), *sys.argv[1:]])


class OnePress:
    """Handles Ctrl-C once for presses that follow each other at once.

    The others would reach whatever deals with the first: the end of a file, a message.
    """

    def __init__(
        self, handle: Callable[[int, FrameType | None], object], former: object = None
    ) -> None:
        """Takes what handles the first, and the handler in whose place this one is for a while."""
        self._handle = handle
        self._former = former
        self._last = -math.inf

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handles the signal."""
        now = time.monotonic()
        if now - self._last > ONE_PRESS:
            self._last = now
            self._handle(number, frame)
            if isinstance(self._former, OnePress):  # which may be back when the others come
                self._former._last = now


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C, SIGTERM or SIGHUP: the step at hand is finished first.

    The second time, Ctrl-C does what it did before: it stops at once. Presses that follow each
    other at once are one. What is ignored stays ignored, as SIGHUP, which comes when a terminal is
    closed, under nohup, and Ctrl-C in a script's background job. In another thread than the main
    one, which gets no signals, it stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def remember(number: int, frame: FrameType | None) -> None:
        former = before[signal.Signals(number)]
        if received and number == signal.SIGINT and callable(former):
            former(number, frame)
        received.append(number)

    before = {}
    for number, handler in (
        (signal.SIGINT, OnePress(remember, signal.getsignal(signal.SIGINT))),
        (signal.SIGTERM, remember),
        (signal.SIGHUP, remember),
    ):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield received
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _open_what_is_closed() -> None:
    """Gives streams that were closed, as by >&-, a place where everything may go."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    while nowhere <= 2:  # else the next file that is opened would get what is printed
        nowhere = os.dup(nowhere)
    os.close(nowhere)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def _discard_output() -> None:
    """Lets what is still to be printed go nowhere: Python writes it out when it exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
