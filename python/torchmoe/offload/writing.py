"""Writing experts to a file, which is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from torchmoe._checks import check_callable, check_kind, shown
from torchmoe.nn import Experts
from torchmoe.nn._sharding import refuse_sharded
from torchmoe.offload.files import (
    NOT_SUPPORTED,
    advise,
    bytes_of,
    checked_path,
    naming,
    sha256_of,
)
from torchmoe.offload.layout import Matrix, header_of, layout_of, tensors_of

UNFINISHED = ".unfinished"  # ends the name of a file that is being written
UNWRITTEN = 64 << 20  # bytes that may wait in memory for the disk
WRITING = "write_store: cannot write the store"


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
    held = tensors_of(experts)
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
    header = header_of(experts, "0" * 64)
    matrices = layout_of("write_store", experts, len(header))
    with _new_file(target) as number:
        end = len(header) + sum(matrix.num_bytes for matrix in matrices.values())
        writer = _Writer(target, number, end)
        if expert is None:
            digest = hashlib.sha256()
            for name, matrix in matrices.items():
                for index in range(matrix.shape[0]):
                    tensor = _in_memory(held[name][index])
                    writer.write(matrix.at(index), bytes_of(tensor))
                    digest.update(bytes_of(tensor))
            found = digest.hexdigest()
        else:
            for index in range(experts.num_experts):
                given = _checked_expert(expert(index), matrices)
                for name, matrix in matrices.items():
                    tensor = _in_memory(given[name])
                    writer.write(matrix.at(index), bytes_of(tensor))
            writer.flush()
            with naming("write_store: cannot read back the store", target):
                found = sha256_of(target, number, len(header), end)
        writer.write(0, memoryview(header_of(experts, found)))


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
                    if error.errno not in NOT_SUPPORTED:
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
        advise(self._number, 0, 0, "DONTNEED")
        self._waiting = 0

    def _naming(self) -> contextlib.AbstractContextManager[None]:
        return naming(WRITING, self._path)


@contextlib.contextmanager
def _new_file(path: str) -> Iterator[int]:
    """A descriptor of a new file that takes its place at the end; an exception removes it."""
    unfinished = path + UNFINISHED
    with naming(WRITING, path):
        number = _create(unfinished)
    try:
        yield number
        with naming(WRITING, path):
            os.fsync(number)
            os.replace(unfinished, path)
    except BaseException:  # Ctrl-C too
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)
        raise
    finally:
        advise(number, 0, 0, "DONTNEED")
        os.close(number)
    with naming("write_store: cannot write the store's folder", path):
        _sync_folder(os.path.dirname(path) or ".")


def _sync_folder(path: str) -> None:
    """Waits until the names in a folder are on the disk, where the file system can say so."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
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
        if error.errno not in NOT_SUPPORTED:
            raise
        return None
    return True


def _lies_at(path: str, number: int) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.lstat(path))
    except FileNotFoundError:
        return False


def _in_memory(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, contiguous on the CPU."""
    return tensor.detach().to("cpu").contiguous()


def _checked_expert(given: object, matrices: dict[str, Matrix]) -> Mapping[str, Tensor]:
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
