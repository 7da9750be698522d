"""Which peaks are probed, with which instructions, and that the probes work."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from benchmarks.peaks import DOT, FMA, LINE, Instructions, Peaks
from documents import ROOT

ALL = {"avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_bf16": True}


def test_the_capability_limits_the_probe() -> None:
    assert Instructions.of("AVX2", ALL).bits == 256
    assert Instructions.of("AVX2", ALL).names == [FMA]
    assert Instructions.of("AVX512", ALL).bits == 512
    assert Instructions.of("AVX512", ALL).names == [FMA, DOT]
    for other in ("DEFAULT", "NO AVX", "SVE256"):
        assert Instructions.of(other, ALL).bits == 128
        assert Instructions.of(other, ALL).flags == ()
        assert Instructions.of(other, ALL).names == [FMA]


def test_the_processor_limits_the_probe() -> None:
    without = Instructions.of("AVX512", {"avx512_f": True, "avx512_bf16": False})
    assert without.names == [FMA]
    assert "-mavx512bf16" not in without.flags
    assert "-mavx512bf16" in Instructions.of("AVX512", ALL).flags


def test_the_probe_is_compiled_as_the_kernels_are() -> None:
    cmake = (ROOT / "cmake" / "simd.cmake").read_text()
    for capability in ("AVX2", "AVX512"):
        (flags,) = re.findall(rf"set\(TORCHMOE_{capability} (.*)\)", cmake)
        inherited, *_ = [*re.findall(r"\$\{TORCHMOE_(\w+)\} ", flags), None]
        wanted = [flag for flag in flags.split() if flag.startswith("-")]
        if inherited:
            wanted = [*Instructions.of(inherited, {}).flags, *wanted]
        assert wanted == [*Instructions.of(capability, {}).flags]


def test_only_bfloat16_is_judged_by_the_dot() -> None:
    with_dot, without = Instructions.of("AVX512", ALL), Instructions.of("AVX2", ALL)
    assert with_dot.peak_of(torch.bfloat16) == DOT
    for dtype in (torch.float32, torch.float16):
        assert with_dot.peak_of(dtype) == FMA
    assert without.peak_of(torch.bfloat16) == FMA


def test_the_heading_says_what_the_share_is_of() -> None:
    assert "256 bits; no bfloat16 dot instruction: U is against the float32 peak" in str(
        Instructions.of("AVX2", ALL)
    )
    assert str(Instructions.of("AVX512", ALL)).endswith("dot, not AMX, which this processor has")
    assert "AMX" not in str(Instructions.of("AVX512", {**ALL, "amx_bf16": False}))


@pytest.mark.needs_build
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_the_probes_run(capability: str) -> None:
    code = (
        "import torch; from benchmarks.peaks import Peaks\n"
        "peaks = Peaks(); found = peaks(1)\n"
        "assert list(found) == peaks.instructions.names and min(found.values()) > 0\n"
        "print(torch.backends.cpu.get_cpu_capability(), peaks.instructions.bits)"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    limited, bits = done.stdout.rsplit(maxsplit=1)
    assert bits == str(Instructions.of(limited, {}).bits)


@pytest.mark.needs_build
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_line_is_written_and_no_other(threads: int) -> None:
    torch.set_num_threads(threads)
    lines = 37
    memory = torch.ones((lines + 2) * LINE + LINE, dtype=torch.int8)
    first = -memory.data_ptr() % LINE
    around = memory[first : first + (lines + 2) * LINE]
    inside = around[LINE:-LINE].view(1, -1)
    peaks = Peaks()
    assert peaks.write(inside) > 0
    assert not inside.any()
    assert around[:LINE].all()
    assert around[-LINE:].all()
    assert peaks.read(inside, torch.tensor([0])) > 0
