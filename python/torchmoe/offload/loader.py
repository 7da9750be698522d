"""The thread that reads: one, in the order in which it is asked."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Loader:
    """Reads in a thread of its own, which starts with the first request.

    The thread ends when nothing refers to the loader any more. A process that was forked gets a
    thread of its own.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0

    def submit(self, read: Callable[[], None]) -> Future[None]:
        """Asks for a read; it begins when those before it have ended."""
        if self._pool is None or self._process != os.getpid():
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="torchmoe-offload")
            self._process = os.getpid()
        return self._pool.submit(read)
