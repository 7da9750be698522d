"""How fast can this machine multiply and add, right now?

Run it as `python -m benchmarks.fma_peak`, or call `FmaPeak` next to what is to be judged by it.
fma_peak.cpp does float32 multiply-adds in registers, on every thread at once, and is compiled with
the system's C++ compiler when it is first used. The vectors are as wide as those of torch's own
kernels on this machine, so that nothing built on the same instructions gets faster.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILER = "c++"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
BITS = {"AVX2": 256, "AVX512": 512}  # by what torch says of itself; 0 is the compiler's choice
SECONDS, TRIALS = 0.02, 3
# So short that every thread may keep its core meanwhile, even where other programs want it.
GLANCE, GLANCES, PAUSE = 0.005, 40, 0.02


class FmaPeak:
    """A probe of the float32 peak."""

    def __init__(self) -> None:
        """Compiles and loads.

        Raises:
            SystemExit: there is no compiler, or it fails.
        """
        self.bits = BITS.get(torch.backends.cpu.get_cpu_capability(), 0)
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "fma_peak.so"
            compile_to(library)
            # What is loaded stays when its file goes.
            self._run = ctypes.CDLL(str(library)).fma_peak
        self._run.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double]
        self._run.restype = ctypes.c_double

    def __call__(self, threads: int | None = None) -> float:
        """GFLOP/s, the best of a few trials of 20 ms, of torch's number of threads or another."""
        return self._best_of(TRIALS, threads or torch.get_num_threads(), SECONDS)

    def undisturbed(self) -> float:
        """GFLOP/s, the best of many glances: what a probe reaches once nothing else runs."""
        found = []
        for _ in range(GLANCES):
            found.append(self._best_of(1, torch.get_num_threads(), GLANCE))
            time.sleep(PAUSE)
        return max(found)

    def _best_of(self, trials: int, threads: int, seconds: float) -> float:
        return max(float(self._run(threads, self.bits, seconds)) for _ in range(trials))


def compile_to(library: Path) -> None:
    """Builds the shared library, or ends with one line that says why not."""
    command = [COMPILER, *FLAGS, str(SOURCE), "-o", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        raise SystemExit(
            f"fma_peak: needs a C++ compiler called {COMPILER}, and there is none"
        ) from None
    if done.returncode != 0:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        raise SystemExit(f"fma_peak: {COMPILER} cannot compile {SOURCE.name}: {first.strip()}")


def main(argv: list[str] | None = None) -> None:
    """Prints a few probes."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fma_peak", description="Measures the float32 FMA peak."
    )
    parser.add_argument("--probes", type=int, default=5, help="how many (default: 5)")
    probes: int = parser.parse_args(argv).probes
    probe = FmaPeak()
    width = f"{probe.bits} bits" if probe.bits else "the compiler's width"
    print(f"{torch.get_num_threads()} threads, vectors of {width}: GFLOP/s")
    print("probes", "  ".join(f"{probe():.1f}" for _ in range(probes)))
    print(f"undisturbed {probe.undisturbed():.1f}")


if __name__ == "__main__":
    main()
