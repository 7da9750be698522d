"""How fast can this machine multiply, read and write, right now?

Run it as `python -m benchmarks.peaks`, or call `Peaks` next to what is to be judged by it.
peaks.cpp does float32 multiply-adds and, where the processor has them, bfloat16 dot products in
registers, on every thread at once. The system's C++ compiler compiles it when it is first used, for
the instructions that torch's own kernels may use and the library's with them:
ATEN_CPU_CAPABILITY limits all three. Wider vectors would double a peak that the kernels cannot
reach.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILER = "c++"
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
# By what torch says of itself; anything else has 128 bits and the compiler's own instructions.
VECTORS = {"AVX2": (256, AVX2), "AVX512": (512, AVX512)}
FMA, DOT = "FMA", "bfloat16 dot"
FUNCTIONS = {FMA: "fma_peak", DOT: "dot_peak"}
SECONDS, TRIALS = 0.02, 3
# So short that every thread may keep its core meanwhile, even where other programs want it.
GLANCE, GLANCES, PAUSE = 0.005, 40, 0.02
LINE = 64  # bytes that are read and written at once

Found = dict[str, float]  # GFLOP/s by the name of the peak


@dataclass(frozen=True)
class Instructions:
    """What the kernels may use, and the probe with them."""

    bits: int
    """Of a vector."""
    flags: tuple[str, ...]
    """For the compiler."""
    has_dot: bool
    """Whether dot products of bfloat16 are among them."""
    leaves_amx: bool
    """Whether the processor multiplies bfloat16 by AMX, too, which is not probed."""

    @classmethod
    def of(cls, capability: str, processor: Mapping[str, object]) -> Instructions:
        """What torch's capability allows of what the processor has.

        Args:
            capability: as `torch.backends.cpu.get_cpu_capability` says.
            processor: as `torch.cpu.get_capabilities` says.
        """
        bits, flags = VECTORS.get(capability, (128, ()))
        has_dot = capability == "AVX512" and bool(processor.get("avx512_bf16"))
        return cls(
            bits,
            (*flags, "-mavx512bf16") if has_dot else flags,
            has_dot,
            has_dot and bool(processor.get("amx_bf16")),
        )

    @property
    def names(self) -> list[str]:
        """The peaks that can be probed."""
        return [FMA, DOT] if self.has_dot else [FMA]

    def peak_of(self, dtype: torch.dtype) -> str:
        """The name of the peak that products of this type are judged by."""
        return DOT if dtype == torch.bfloat16 and self.has_dot else FMA

    def __str__(self) -> str:
        """What U is a share of."""
        text = f"float32 FMA with vectors of {self.bits} bits"
        if not self.has_dot:
            return f"{text}; no bfloat16 dot instruction: U is against the float32 peak"
        text += "; bfloat16: AVX512-BF16 dot"
        return f"{text}, not AMX, which this processor has" if self.leaves_amx else text


class Peaks:
    """Probes of the arithmetic's peaks and of the memory's speed."""

    def __init__(self) -> None:
        """Compiles and loads.

        Raises:
            SystemExit: there is no compiler, or it fails.
        """
        capability = torch.backends.cpu.get_cpu_capability()
        self.instructions = Instructions.of(capability, torch.cpu.get_capabilities())
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "peaks.so"
            compile_to(file, self.instructions.flags)
            # What is loaded stays when its file goes.
            library = ctypes.CDLL(str(file))
        self._rates = {name: getattr(library, FUNCTIONS[name]) for name in self.instructions.names}
        for rate in self._rates.values():
            rate.argtypes = [ctypes.c_int, ctypes.c_double]
            rate.restype = ctypes.c_double
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._read_rows, self._write_lines = library.read_rows, library.write_lines
        self._read_rows.argtypes = [ctypes.c_int, pointer, size, pointer, size]
        self._write_lines.argtypes = [ctypes.c_int, pointer, size]
        self._read_rows.restype = self._write_lines.restype = ctypes.c_double

    def __call__(self, threads: int | None = None) -> Found:
        """GFLOP/s, the best of a few trials of 20 ms, of torch's number of threads or another."""
        count = threads or torch.get_num_threads()
        return {name: self._best_of(TRIALS, name, count, SECONDS) for name in self._rates}

    def undisturbed(self) -> Found:
        """GFLOP/s, the best of many glances: what a probe reaches once nothing else runs."""
        found = dict.fromkeys(self._rates, 0.0)
        for _ in range(GLANCES):
            for name in found:
                rate = self._best_of(1, name, torch.get_num_threads(), GLANCE)
                found[name] = max(found[name], rate)
            time.sleep(PAUSE)
        return found

    def _best_of(self, trials: int, name: str, threads: int, seconds: float) -> float:
        return max(float(self._rates[name](threads, seconds)) for _ in range(trials))

    def read(self, memory: Tensor, rows: Tensor) -> float:
        """Seconds to read some rows of a matrix [*, lines * LINE], int8; `rows` are their ids."""
        lines = memory.shape[1] // LINE
        return float(
            self._read_rows(
                torch.get_num_threads(), memory.data_ptr(), lines, rows.data_ptr(), len(rows)
            )
        )

    def write(self, memory: Tensor) -> float:
        """Seconds to overwrite the matrix."""
        lines = memory.numel() // LINE
        return float(self._write_lines(torch.get_num_threads(), memory.data_ptr(), lines))


def compile_to(library: Path, flags: tuple[str, ...]) -> None:
    """Builds the shared library, or ends with one line that says why not."""
    command = [COMPILER, *FLAGS, *flags, str(SOURCE), "-o", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        raise SystemExit(
            f"peaks: needs a C++ compiler called {COMPILER}, and there is none"
        ) from None
    if done.returncode != 0:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        raise SystemExit(f"peaks: {COMPILER} cannot compile {SOURCE.name}: {first.strip()}")


def main(argv: list[str] | None = None) -> None:
    """Prints a few probes."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peaks", description="Measures the peaks of the arithmetic."
    )
    parser.add_argument("--probes", type=int, default=5, help="how many (default: 5)")
    probes: int = parser.parse_args(argv).probes
    peaks = Peaks()
    print(f"{torch.get_num_threads()} threads; {peaks.instructions}. GFLOP/s")
    found = [peaks() for _ in range(probes)]
    for name, best in peaks.undisturbed().items():
        print(f"{name}:", *(f"{one[name]:.1f}" for one in found), f"undisturbed {best:.1f}")


if __name__ == "__main__":
    main()
