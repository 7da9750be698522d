"""Experts in a file: opened once, then read expert by expert.

A file, which `write_store` has written, is read with `preadv` into memory that the caller owns, and
never mapped: a mapped file that is cut short kills the process, and its pages belong to nobody's
budget. What has been read is dropped from the page cache at once, and the next piece is asked for
meanwhile, so that a reading thread has at most `window_bytes` of pages in the cache. Where the
system takes no such advice (macOS, some network file systems) they stay as long as the system has
room for them.
"""

from __future__ import annotations

import os
import stat
import weakref
from collections.abc import Mapping

from torch import Tensor

from torchmoe._checks import shown
from torchmoe.nn import Experts
from torchmoe.offload.files import (
    advise,
    bytes_of,
    checked_path,
    forget,
    naming,
    pieces_of,
    read_fully,
    sha256_of,
)
from torchmoe.offload.layout import Matrix, layout_of, read_header, read_layout, sizes_of


class _Descriptor:
    """An open file, closed when the last one who reads it has let go of it.

    A reader holds it while it reads, so that the number cannot become another file's under it.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        # At the end of the process the system closes it, even under a thread that still reads.
        weakref.finalize(self, os.close, number).atexit = False


class ExpertStore:
    """A file of experts, open for reading.

    Any number of threads may read at once, and processes that were forked share it. A file that is
    deleted, or replaced by a new one under its name, stays readable here as it was.

    Attributes:
        path: of the file.
        num_experts: E.
        expert_bytes: bytes of one expert.
        num_bytes: bytes of all experts.
        window_bytes: most bytes of the file that are in the page cache while one thread reads.
    """

    path: str
    num_experts: int
    expert_bytes: int
    num_bytes: int
    window_bytes: int

    def __init__(
        self,
        path: str,
        descriptor: _Descriptor,
        matrices: dict[str, Matrix],
        opened: os.stat_result,
    ) -> None:
        self.path = path
        self._descriptor: _Descriptor | None = descriptor
        self._matrices = matrices
        self._opened = opened
        self.num_experts = next(iter(matrices.values())).shape[0]
        self.expert_bytes, self.window_bytes = sizes_of(matrices)
        self.num_bytes = self.num_experts * self.expert_bytes

    @classmethod
    def open(cls, path: str | os.PathLike[str], experts: Experts) -> ExpertStore:
        """Opens a file and reads all of it once, to compare it with the SHA-256 that it names.

        Args:
            path: of a file that `write_store` or `offload` has written.
            experts: on any device, the meta device too; the file must have tensors of their names,
                shapes and dtype, and name their activation.

        Raises:
            OSError: the file is not there or cannot be read.
            ValueError: it is no such file, was cut short or changed, or holds other experts.
        """
        name = checked_path("offload", "store", path)
        expected = layout_of("offload", experts, 0)
        with naming("offload: cannot open the store", name):
            # Waiting for a writer of a named pipe would never end.
            descriptor = _Descriptor(os.open(name, os.O_RDONLY | os.O_NONBLOCK))
        with naming("offload: cannot read the store", name):
            opened = os.fstat(descriptor.number)
            if not stat.S_ISREG(opened.st_mode):
                raise ValueError(f"offload: store must be a file, got {name}")
            # Reading ahead would put pages into the cache that nobody asked for.
            advise(descriptor.number, 0, 0, "RANDOM")
            header, begin = read_header(name, descriptor.number, opened.st_size)
            matrices = read_layout(name, header, begin, opened.st_size, experts, expected)
            end = begin + sum(matrix.num_bytes for matrix in matrices.values())
            found = sha256_of(name, descriptor.number, begin, end)
            advise(descriptor.number, 0, 0, "DONTNEED")
            promised = header["__metadata__"].get("sha256")
            if found != promised:
                raise ValueError(
                    f"offload: store must hold the data whose SHA-256 its header names, "
                    f"{promised}, got {name} with {found}"
                )
            store = cls(name, descriptor, matrices, opened)
            store._check_unchanged(descriptor)
        return store

    def read(self, expert: int, into: Mapping[str, Tensor]) -> int:
        """Reads one expert.

        Args:
            expert: its number in [0, E).
            into: for each tensor of the file, under its name, a contiguous CPU tensor of the shape
                of one expert's slice and the dtype of the file.

        Returns:
            The bytes read.

        Raises:
            IndexError: there is no such expert.
            RuntimeError: `into` does not fit, or the file has changed since it was opened.
            OSError: the system cannot read it.
            ValueError: it was closed.
        """
        descriptor = self._descriptor
        if descriptor is None:
            raise ValueError(f"offload: store must be open, got {self.path} after close()")
        if not 0 <= expert < self.num_experts:
            raise IndexError(
                f"offload: expert must be in [0, {self.num_experts}), got {expert} of {self.path}"
            )
        self._check_tensors(into)
        pieces = [
            (offset, buffer)
            for name, matrix in self._matrices.items()
            for offset, buffer in pieces_of(matrix.at(expert), bytes_of(into[name]))
        ]
        with naming("offload: cannot read the store", self.path):
            for place, (offset, buffer) in enumerate(pieces):
                if place + 1 < len(pieces):
                    following, after = pieces[place + 1]
                    advise(descriptor.number, following, len(after), "WILLNEED")
                if not read_fully(descriptor.number, offset, buffer):
                    break  # it is shorter than it was
                forget(descriptor.number, offset, len(buffer))
            # Whatever was written since the file was opened, before or while it was read.
            self._check_unchanged(descriptor)
        return self.expert_bytes

    def close(self) -> None:
        """Closes the file, once those who are reading have finished; again does nothing."""
        self._descriptor = None

    def _check_tensors(self, into: Mapping[str, Tensor]) -> None:
        if into.keys() != self._matrices.keys():
            raise RuntimeError(
                f"offload: into must have {', '.join(self._matrices)}, got {', '.join(into)}"
            )
        for name, matrix in self._matrices.items():
            tensor, shape = into[name], matrix.shape[1:]
            fits = tensor.shape == shape and tensor.dtype == matrix.dtype
            if not fits or not tensor.is_contiguous() or tensor.device.type != "cpu":
                raise RuntimeError(
                    f"offload: into must have {name} as a contiguous CPU tensor of {matrix.dtype} "
                    f"of shape {list(shape)}, got {shown(tensor)}"
                )

    def _check_unchanged(self, descriptor: _Descriptor) -> None:
        """Raises RuntimeError if the file is not as it was when it was opened."""
        now, then = os.fstat(descriptor.number), self._opened
        if now.st_size != then.st_size:
            raise RuntimeError(
                f"offload: store must stay as it was opened, of {then.st_size} bytes, got "
                f"{self.path} of {now.st_size} bytes"
            )
        # Deleting or replacing the name changes the time of the last change, but no byte.
        same_links = now.st_nlink == then.st_nlink
        if now.st_mtime_ns != then.st_mtime_ns or (
            same_links and now.st_ctime_ns != then.st_ctime_ns
        ):
            raise RuntimeError(
                f"offload: store must stay as it was opened, got {self.path}, which was written to "
                "since"
            )
