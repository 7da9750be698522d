"""Experts in a file: written once, then read expert by expert.

The file is in the format of safetensors: the length of a header in 8 bytes, the header as JSON, and
the bytes of the tensors without gaps. The tensors are those of a stacked `torchmoe.nn.Experts`
under their own names, so that an expert is one contiguous slice of each. The header names, as
`__metadata__`, the version of this layout, the activation, and the SHA-256 of everything behind the
header. It is padded with spaces to whole pages.

A file is read with `preadv` into memory that the caller owns, and never mapped: a mapped file that
is cut short kills the process, and its pages belong to nobody's budget. What has been read is
dropped from the page cache at once, and the next piece is asked for meanwhile, so that a reading
thread has at most `window_bytes` of pages in the cache. Where the system takes no such advice
(macOS, some network file systems) they stay as long as the system has room for them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import stat
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchmoe._checks import check_callable, check_kind, shown
from torchmoe.nn import Experts
from torchmoe.nn._sharding import refuse_sharded

VERSION = "1"  # of the layout; a reader of another one refuses the file
UNFINISHED = ".unfinished"  # ends the name of a file that is being written
CHUNK = 2 << 20  # bytes that are read at once: smaller ones leave a disk waiting
UNWRITTEN = 64 << 20  # bytes that may wait in memory for the disk
LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
WRITING = "write_store: cannot write the store"

_PAGE = os.sysconf("SC_PAGE_SIZE")
_PREFIX = 8  # bytes of the header's length
_CODES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
# Errors of a file system that has no locks, reserves no room, or keeps folders by itself.
_NOT_SUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True)
class _Matrix:
    """One tensor of the file."""

    shape: tuple[int, ...]  # [E, ...]
    dtype: torch.dtype
    offset: int  # of its first byte in the file

    @property
    def slice_bytes(self) -> int:
        """Of one expert."""
        elements = 1
        for size in self.shape[1:]:
            elements *= size
        return elements * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Of all experts."""
        return self.shape[0] * self.slice_bytes

    def at(self, expert: int) -> int:
        """Where an expert's slice begins in the file."""
        return self.offset + expert * self.slice_bytes


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
        matrices: dict[str, _Matrix],
        opened: os.stat_result,
    ) -> None:
        self.path = path
        self._descriptor: _Descriptor | None = descriptor
        self._matrices = matrices
        self._opened = opened
        self.num_experts = next(iter(matrices.values())).shape[0]
        self.expert_bytes, self.window_bytes = _sizes(matrices)
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
        expected = _layout("offload", experts, 0)
        with _naming("offload: cannot open the store", name):
            # Waiting for a writer of a named pipe would never end.
            descriptor = _Descriptor(os.open(name, os.O_RDONLY | os.O_NONBLOCK))
        with _naming("offload: cannot read the store", name):
            opened = os.fstat(descriptor.number)
            if not stat.S_ISREG(opened.st_mode):
                raise ValueError(f"offload: store must be a file, got {name}")
            # Reading ahead would put pages into the cache that nobody asked for.
            _advise(descriptor.number, 0, 0, "RANDOM")
            header, begin = _read_header(name, descriptor.number, opened.st_size)
            matrices = _read_layout(name, header, begin, opened.st_size, experts, expected)
            end = begin + sum(matrix.num_bytes for matrix in matrices.values())
            found = _sha256(name, descriptor.number, begin, end)
            _advise(descriptor.number, 0, 0, "DONTNEED")
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
            for offset, buffer in _pieces(matrix.at(expert), _bytes_of(into[name]))
        ]
        with _naming("offload: cannot read the store", self.path):
            for place, (offset, buffer) in enumerate(pieces):
                if place + 1 < len(pieces):
                    following, after = pieces[place + 1]
                    _advise(descriptor.number, following, len(after), "WILLNEED")
                if not _read_fully(descriptor.number, offset, buffer):
                    break  # it is shorter than it was
                _forget(descriptor.number, offset, len(buffer))
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


def write_store(
    path: str | os.PathLike[str],
    experts: Experts,
    expert: Callable[[int], Mapping[str, Tensor]] | None = None,
) -> None:
    """Writes experts to a file, from which `offload` streams them.

    The file is there whole or not at all. Until it is on the disk it lies next to its place under
    the name of `path` + ".unfinished"; a failed call removes that, and what a killed process leaves
    behind the next call replaces. A file that `path` named before stays until then, and those who
    have it open read on in it.

    A model that fits into no memory is written expert by expert: make the experts on the meta
    device, and give `expert`, which returns one at a time. Then, and in any case, at most one
    expert and 64 MiB of the file are held in memory; the SHA-256 of the data takes a second pass
    over the file.

    `safetensors` reads the file, too.

    Args:
        path: where to.
        experts: what to write; on the meta device, its sizes, activation and dtype.
        expert: for experts on the meta device, gives expert e in [0, E): a tensor under each name
            of the experts' parameters, without the leading dimension: gate_up_proj [2 * I, H] or
            up_proj [I, H], down_proj [H, I], and the biases, if any.

    Raises:
        OSError: the disk is full or the file cannot be written.
        TypeError: an argument is of another kind.
        RuntimeError: a tensor is of another shape or dtype.
        ValueError: experts on the meta device without `expert`, or others with it.

    Example:
        >>> experts = torchmoe.nn.Experts(64, 128, 8, device="meta")
        >>> def expert(e):
        ...     return {"gate_up_proj": torch.randn(256, 64), "down_proj": torch.randn(64, 128)}
        >>> write_store("experts.safetensors", experts, expert)
    """
    target = checked_path("write_store", "path", path)
    check_kind("write_store", "experts", experts, Experts)
    refuse_sharded("write_store", "experts", experts)
    held = _tensors_of(experts)
    is_meta = any(tensor.is_meta for tensor in held.values())
    if is_meta and expert is None:
        raise ValueError(
            "write_store: expert must be given for experts on the meta device, got None"
        )
    if expert is not None:
        check_callable("write_store", "expert", expert)
        if not is_meta:
            raise ValueError(
                "write_store: expert must be None for experts that hold their values, "
                f"got {shown(expert)}"
            )
    header = _header(experts, "0" * 64)
    matrices = _layout("write_store", experts, len(header))
    with _new_file(target) as number:
        end = len(header) + sum(matrix.num_bytes for matrix in matrices.values())
        writer = _Writer(target, number, end)
        if expert is None:
            digest = hashlib.sha256()
            for name, matrix in matrices.items():
                for index in range(matrix.shape[0]):
                    tensor = _in_memory(held[name][index])
                    writer.write(matrix.at(index), _bytes_of(tensor))
                    digest.update(_bytes_of(tensor))
            found = digest.hexdigest()
        else:
            for index in range(experts.num_experts):
                given = _checked_expert(expert(index), matrices)
                for name, matrix in matrices.items():
                    tensor = _in_memory(given[name])
                    writer.write(matrix.at(index), _bytes_of(tensor))
            writer.flush()
            with _naming("write_store: cannot read back the store", target):
                found = _sha256(target, number, len(header), end)
        writer.write(0, memoryview(_header(experts, found)))


class _Writer:
    """Writes to a file at any place, with little of it waiting in memory."""

    def __init__(self, path: str, number: int, size: int) -> None:
        """Takes the name that errors give, the open file, and how large it will be."""
        self._path, self._number = path, number
        self._waiting = 0
        # A disk that is too small says so before hours of work.
        if hasattr(os, "posix_fallocate"):
            with self._naming():
                try:
                    os.posix_fallocate(number, 0, size)
                except OSError as error:
                    if error.errno not in _NOT_SUPPORTED:
                        raise

    def write(self, offset: int, content: memoryview) -> None:
        """Writes bytes."""
        while len(content) > 0:
            with self._naming():
                written = os.pwrite(self._number, content[:UNWRITTEN], offset)
            content, offset = content[written:], offset + written
            self._waiting += written
            if self._waiting >= UNWRITTEN:
                self.flush()

    def flush(self) -> None:
        """Waits for the disk, and leaves nothing in the page cache."""
        with self._naming():
            os.fsync(self._number)
        _advise(self._number, 0, 0, "DONTNEED")
        self._waiting = 0

    def _naming(self) -> contextlib.AbstractContextManager[None]:
        return _naming(WRITING, self._path)


@contextlib.contextmanager
def _new_file(path: str) -> Iterator[int]:
    """A descriptor of a new file that takes its place at the end; an exception removes it."""
    unfinished = path + UNFINISHED
    with _naming(WRITING, path):
        number = _create(unfinished)
    try:
        yield number
        with _naming(WRITING, path):
            os.fsync(number)
            os.replace(unfinished, path)
    except BaseException:  # Ctrl-C too
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)
        raise
    finally:
        _advise(number, 0, 0, "DONTNEED")
        os.close(number)
    with _naming("write_store: cannot write the store's folder", path):
        _sync_folder(os.path.dirname(path) or ".")


def _sync_folder(path: str) -> None:
    """Waits until the names in a folder are on the disk, where the file system can say so."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(number)


def _create(path: str) -> int:
    """A new file that this process alone writes, in place of one that a killed process left."""
    while True:
        try:
            number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            _remove_left_behind(path)
            continue
        if _lock(number) is not False and _lies_at(path, number):
            return number
        os.close(number)  # another process took it for left behind before it was locked


def _remove_left_behind(path: str) -> None:
    """Deletes a file that no process has locked; raises BlockingIOError if one may have."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    try:
        if not _lock(number):
            raise BlockingIOError(errno.EWOULDBLOCK, f"another process may be writing {path}")
        if _lies_at(path, number):
            os.unlink(path)
    finally:
        os.close(number)


def _lock(number: int) -> bool | None:
    """Locks an open file until it is closed.

    Returns:
        False where another process has the lock, None where the file system has no locks.
    """
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        return None
    return True


def _lies_at(path: str, number: int) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.lstat(path))
    except FileNotFoundError:
        return False


def _tensors_of(experts: Experts) -> dict[str, Tensor]:
    """The parameters by name, in the order of the file."""
    in_name = experts._in_name
    names = (in_name, in_name + "_bias", "down_proj", "down_proj_bias")
    return {name: tensor for name in names if (tensor := getattr(experts, name)) is not None}


def _layout(owner: str, experts: Experts, begin: int) -> dict[str, _Matrix]:
    """Where the tensors lie in a file whose header ends at `begin`."""
    matrices: dict[str, _Matrix] = {}
    for name, tensor in _tensors_of(experts).items():
        if tensor.dtype not in _CODES:
            raise RuntimeError(
                f"{owner}: experts must be of float32, float64, bfloat16 or float16, "
                f"got {name} of {tensor.dtype}"
            )
        if tensor.dtype != experts.down_proj.dtype:
            raise RuntimeError(
                f"{owner}: experts must be of one dtype, got {name} of {tensor.dtype} and "
                f"down_proj of {experts.down_proj.dtype}"
            )
        matrices[name] = _Matrix(tuple(tensor.shape), tensor.dtype, begin)
        begin += matrices[name].num_bytes
    return matrices


def stored_sizes(owner: str, experts: Experts) -> tuple[int, int]:
    """The expert_bytes and window_bytes that a store of these experts has, see `ExpertStore`."""
    return _sizes(_layout(owner, experts, 0))


def _sizes(matrices: dict[str, _Matrix]) -> tuple[int, int]:
    sizes = [matrix.slice_bytes for matrix in matrices.values()]
    # The piece that is read and the next one; a slice begins and ends within a page.
    window = min(2 * CHUNK, sum(_whole_pages(size) + _PAGE for size in sizes))
    return sum(sizes), window


def _header(experts: Experts, sha256: str) -> bytes:
    """The file up to its data; as long for one SHA-256 as for another."""
    content: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",  # what Transformers asks of a file
            "torchmoe.offload": VERSION,
            "activation": experts.activation,
            "sha256": sha256,
        }
    }
    for name, matrix in _layout("write_store", experts, 0).items():
        content[name] = {
            "dtype": _CODES[matrix.dtype],
            "shape": list(matrix.shape),
            "data_offsets": [matrix.offset, matrix.offset + matrix.num_bytes],
        }
    text = json.dumps(content, separators=(",", ":")).encode()
    text = text.ljust(_whole_pages(_PREFIX + len(text)) - _PREFIX)
    return len(text).to_bytes(_PREFIX, "little") + text


def _read_header(path: str, number: int, size: int) -> tuple[dict[str, Any], int]:
    """The header's content and where the data begins; raises ValueError if there is none."""
    not_one = f"offload: store must be a file of safetensors, got {path}"
    prefix = bytearray(_PREFIX)
    if size < _PREFIX or not _read_fully(number, 0, memoryview(prefix)):
        raise ValueError(f"{not_one} of {size} bytes")
    length = int.from_bytes(prefix, "little")
    if length > min(LONGEST_HEADER, size - _PREFIX):
        raise ValueError(f"{not_one} of {size} bytes with a header of {length} bytes")
    text = bytearray(length)
    if not _read_fully(number, _PREFIX, memoryview(text)):
        raise ValueError(f"{not_one}, which ends within its header")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{not_one}, whose header is not JSON") from error
    if not isinstance(content, dict):
        raise ValueError(f"{not_one}, whose header is not a JSON object")
    return content, _PREFIX + length


def _read_layout(
    path: str,
    header: dict[str, Any],
    begin: int,
    size: int,
    experts: Experts,
    expected: dict[str, _Matrix],
) -> dict[str, _Matrix]:
    """Where the tensors lie; raises ValueError unless the header describes these experts."""
    metadata = header.get("__metadata__")
    version = metadata.get("torchmoe.offload") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or version is None:
        raise ValueError(
            f"offload: store must be written by offload or write_store, got {path}, whose header "
            "does not say so"
        )
    if version != VERSION:
        raise ValueError(
            f"offload: store must be of version {VERSION}, got {path} of version {version}"
        )
    if metadata.get("activation") != experts.activation:
        raise ValueError(
            f"offload: store must be of experts with the activation {experts.activation}, "
            f"got {path} with {metadata.get('activation')}"
        )
    found = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if found.keys() != expected.keys():
        raise ValueError(
            f"offload: store must have the tensors {', '.join(expected)}, got {path} with "
            f"{', '.join(sorted(found)) or 'none'}"
        )
    matrices: dict[str, _Matrix] = {}
    for name, matrix in expected.items():
        entry = found[name] if isinstance(found[name], dict) else {}
        wanted = {"dtype": _CODES[matrix.dtype], "shape": list(matrix.shape)}
        for key, value in wanted.items():
            if entry.get(key) != value:
                raise ValueError(
                    f"offload: store must have {name} of {key} {value}, got {path} with "
                    f"{entry.get(key)}"
                )
        matrices[name] = _Matrix(matrix.shape, matrix.dtype, _begin_of(path, name, matrix, entry))
    # Sorted by where they begin, each ends where the next one begins: no gap and no overlap.
    end = 0
    for name, matrix in sorted(matrices.items(), key=lambda item: item[1].offset):
        if matrix.offset != end:
            raise ValueError(
                f"offload: store must have tensors side by side, got {path} with {name} at "
                f"{matrix.offset} of its data instead of {end}"
            )
        end += matrix.num_bytes
    if begin + end != size:
        raise ValueError(
            f"offload: store must have {begin + end} bytes, as its header says, got {path} of "
            f"{size} bytes"
        )
    return {
        name: _Matrix(matrix.shape, matrix.dtype, begin + matrix.offset)
        for name, matrix in matrices.items()
    }


def _begin_of(path: str, name: str, matrix: _Matrix, entry: dict[str, Any]) -> int:
    """Where a tensor begins in the data; raises ValueError unless it has the matrix's bytes."""
    offsets = entry.get("data_offsets")
    is_pair = isinstance(offsets, list) and [type(offset) for offset in offsets] == [int, int]
    begin, end = offsets if is_pair and offsets else (0, -1)
    if end - begin != matrix.num_bytes:
        raise ValueError(
            f"offload: store must have {matrix.num_bytes} bytes of {name}, got {path} with the "
            f"offsets {offsets}"
        )
    return begin


def _sha256(path: str, number: int, begin: int, end: int) -> str:
    """Of a stretch of an open file, without filling the page cache with it."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    for offset in range(begin, end, CHUNK):
        piece = buffer[: min(CHUNK, end - offset)]
        _advise(number, offset + CHUNK, max(0, min(CHUNK, end - offset - CHUNK)), "WILLNEED")
        if not _read_fully(number, offset, piece):
            raise ValueError(f"offload: store must have {end} bytes, got {path}, which ends before")
        _forget(number, offset, len(piece))
        digest.update(piece)
    return digest.hexdigest()


def _pieces(offset: int, buffer: memoryview) -> Iterator[tuple[int, memoryview]]:
    """A stretch of the file in pieces that touch at most CHUNK bytes of pages each."""
    while len(buffer) > 0:
        length = CHUNK - offset % _PAGE
        yield offset, buffer[:length]
        offset, buffer = offset + length, buffer[length:]


def _read_fully(number: int, offset: int, buffer: memoryview) -> bool:
    """Fills the buffer from the file; False where the file ends before."""
    while len(buffer) > 0:
        count = os.preadv(number, [buffer], offset)
        if count == 0:
            return False
        offset, buffer = offset + count, buffer[count:]
    return True


def _forget(number: int, offset: int, length: int) -> None:
    """Drops the pages that the stretch touches from the page cache."""
    begin = offset - offset % _PAGE
    _advise(number, begin, _whole_pages(offset + length) - begin, "DONTNEED")


def _advise(number: int, offset: int, length: int, advice: str) -> None:
    """Advice to the system on a stretch of a file, where there is such a call; 0 is to the end."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # of a file system that takes none
            os.posix_fadvise(number, offset, length, getattr(os, f"POSIX_FADV_{advice}"))


def _in_memory(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, contiguous on the CPU."""
    return tensor.detach().to("cpu").contiguous()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, which the caller keeps alive."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")


def _whole_pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def checked_path(owner: str, argument: str, path: str | os.PathLike[str]) -> str:
    """The path as text; raises TypeError if it is none."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{owner}: {argument} must be a path, got {shown(path)}")
    return os.fspath(path)


def _checked_expert(given: object, matrices: dict[str, _Matrix]) -> Mapping[str, Tensor]:
    """What `expert` returned; raises TypeError or RuntimeError unless it is one expert."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"write_store: expert must return a mapping of names to tensors, got {shown(given)}"
        )
    if given.keys() != matrices.keys():
        raise RuntimeError(
            f"write_store: expert must return {', '.join(matrices)}, got "
            f"{', '.join(map(str, given)) or 'nothing'}"
        )
    for name, matrix in matrices.items():
        tensor, shape = given[name], matrix.shape[1:]
        fits = isinstance(tensor, Tensor) and not tensor.is_meta
        if not fits or tensor.shape != shape or tensor.dtype != matrix.dtype:
            raise RuntimeError(
                f"write_store: expert must return {name} as a tensor of {matrix.dtype} of shape "
                f"{list(shape)}, got {shown(tensor)}"
            )
    return given


@contextlib.contextmanager
def _naming(doing: str, path: str) -> Iterator[None]:
    """Lets an error of the system say what was done, to which file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{doing}: {error.strerror}", path) from error
