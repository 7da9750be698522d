"""Files of experts as the system sees them: reads that leave no pages in its cache."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
from collections.abc import Iterable, Iterator

from torch import Tensor

from torchmoe._checks import shown

PAGE = os.sysconf("SC_PAGE_SIZE")
CHUNK = 2 << 20  # bytes that are read at once: smaller ones leave a disk waiting
# Errors of a file system that has no locks, reserves no room, or keeps folders by itself.
NOT_SUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def checked_path(owner: str, argument: str, path: str | os.PathLike[str]) -> str:
    """The path as text; raises TypeError if it is none."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{owner}: {argument} must be a path, got {shown(path)}")
    return os.fspath(path)


@contextlib.contextmanager
def naming(doing: str, path: str) -> Iterator[None]:
    """Lets an error of the system say what was done, to which file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{doing}: {error.strerror}", path) from error


def whole_pages(size: int) -> int:
    """The size rounded up to pages."""
    return -(-size // PAGE) * PAGE


def advise(number: int, offset: int, length: int, advice: str) -> None:
    """Advice to the system on a stretch of a file, where there is such a call; 0 is to the end."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # of a file system that takes none
            os.posix_fadvise(number, offset, length, getattr(os, f"POSIX_FADV_{advice}"))


def forget(number: int, offset: int, length: int) -> None:
    """Drops the pages that the stretch touches from the page cache."""
    begin = offset - offset % PAGE
    advise(number, begin, whole_pages(offset + length) - begin, "DONTNEED")


def read_fully(number: int, offset: int, buffer: memoryview) -> bool:
    """Fills the buffer from the file; False where the file ends before."""
    while len(buffer) > 0:
        count = os.preadv(number, [buffer], offset)
        if count == 0:
            return False
        offset, buffer = offset + count, buffer[count:]
    return True


def sha256_of(path: str, number: int, begin: int, end: int) -> str:
    """Of a stretch of an open file, without filling the page cache with it."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    for offset in range(begin, end, CHUNK):
        piece = buffer[: min(CHUNK, end - offset)]
        advise(number, offset + CHUNK, max(0, min(CHUNK, end - offset - CHUNK)), "WILLNEED")
        if not read_fully(number, offset, piece):
            raise ValueError(f"offload: store must have {end} bytes, got {path}, which ends before")
        forget(number, offset, len(piece))
        digest.update(piece)
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, which the caller keeps alive."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")


def pieces_of(offset: int, buffer: memoryview) -> Iterator[tuple[int, memoryview]]:
    """A stretch of the file in pieces that touch at most CHUNK bytes of pages each."""
    while len(buffer) > 0:
        length = CHUNK - offset % PAGE
        yield offset, buffer[:length]
        offset, buffer = offset + length, buffer[length:]


def window_of(sizes: Iterable[int]) -> int:
    """Most bytes in the page cache while pieces are read of stretches of these sizes."""
    # The piece that is read and the next one; a stretch begins and ends within a page.
    return min(2 * CHUNK, sum(whole_pages(size) + PAGE for size in sizes))
