"""What the system counts as memory: of this process, and of a file."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path


def process_bytes() -> int:
    """Of this process, in memory."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Rss:")).split()[1])


def cached_bytes(path: Path) -> int:
    """Of a file, in the page cache; looking at it through a mapping touches no page."""
    size = path.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as view:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        begin = ctypes.c_ubyte.from_buffer(view)
        assert libc.mincore(ctypes.byref(begin), ctypes.c_size_t(size), pages) == 0
        del begin
        return mmap.PAGESIZE * sum(page & 1 for page in pages)
