"""torchmoe.keep_freed_memory, in processes of their own, since it lasts."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

import torchmoe

MIB = 2**20
SIZE = 96  # MiB, above every threshold of glibc's

PROGRAM = f"""
import resource, sys
import torch, torchmoe

def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) // 1024

if "keep" in sys.argv:
    assert torchmoe.keep_freed_memory()
    assert torchmoe.keep_freed_memory()
before = resident()
for _ in range(4):  # a block that other memory surrounds is taken again from the third time on
    x = torch.ones({SIZE} * {MIB}, dtype=torch.uint8)
    used = resident() - before
    del x
kept = resident() - before
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
x = torch.ones({SIZE} * {MIB}, dtype=torch.uint8)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
print(used, kept, faults)
"""

on_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="glibc's allocator is not there"
)


def run(*arguments: str) -> tuple[int, int, int]:
    """MiB in use, MiB kept when it was freed, page faults of using as much again."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True
    )
    used, kept, faults = map(int, done.stdout.split())
    return used, kept, faults


@on_glibc
def test_freed_memory_stays_and_serves_again() -> None:
    used, kept, faults = run("keep")
    assert used >= SIZE
    assert kept >= SIZE
    assert faults < 16


@on_glibc
def test_without_the_call_it_goes_back() -> None:
    used, kept, faults = run()
    assert used >= SIZE
    assert kept < SIZE // 4
    assert faults >= SIZE // 2  # the largest pages have 2 MiB


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert torchmoe.keep_freed_memory() is False


@pytest.mark.parametrize("refused", [0, 1])
def test_a_refusal_is_told(monkeypatch: pytest.MonkeyPatch, refused: int) -> None:
    calls = []

    class Library:
        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            calls.append((parameter, value))
            return int(len(calls) - 1 != refused)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    assert torchmoe.keep_freed_memory() is False
    assert calls == [(-4, 0), (-1, -1)][: refused + 1]
