"""Prints how many compilers may run at once: one for each core that this process has, and 1 GB.

MAX_JOBS, where it is set, decides instead.
"""

import os
from pathlib import Path

BYTES_OF_A_JOB = 10**9
#: Limits that a container sets, of either version of control groups.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def available_bytes() -> float:
    """The memory that can be had without swapping, as far as Linux tells."""
    found = [float("inf")]
    for limit in LIMITS:
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            found.append(int(text))
    memory = Path("/proc/meminfo")
    if memory.is_file():
        for line in memory.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    return min(found)


def build_jobs() -> int:
    """See above."""
    if asked := os.environ.get("MAX_JOBS"):
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, int(min(cores or 1, available_bytes() // BYTES_OF_A_JOB)))


if __name__ == "__main__":
    print(build_jobs())
