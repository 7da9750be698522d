"""Memory that a process frees, and whether the system gets it back."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt (malloc.h), and what they are set to.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER, _NONE = -1, 0


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that its tensors free, for the next ones.

    A training step frees its gradients and activations and asks for the same sizes again. The C
    library of Linux returns large blocks to the system and gets new pages, which the system fills
    with zeros; on a CPU that takes some percent of a step. After this call freed memory stays with
    the process, whose size therefore stays at the largest that it had: call it once, before
    training, in a program that trains until it ends. Results do not change.

    It sets glibc's `M_MMAP_MAX` to 0 and switches trimming off (`mallopt(3)`), for the whole
    process and for good. It has no part in memory of a GPU.

    Returns:
        Whether the process's allocator took the setting; False where it is not glibc's (macOS,
        musl), and nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(
        mallopt(parameter, value) == 1
        for parameter, value in ((_M_MMAP_MAX, _NONE), (_M_TRIM_THRESHOLD, _NEVER))
    )
