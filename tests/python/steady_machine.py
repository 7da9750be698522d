"""A machine whose peaks are given, for tests of what benchmarks make of them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from benchmarks.peaks import FMA, Found, Instructions

AVX2 = Instructions.of("AVX2", {})
AVX512_BF16 = Instructions.of("AVX512", {"avx512_bf16": True})


class SteadyPeaks:
    """In the place of `benchmarks.peaks.Peaks`: each look finds the next FMA peak, the last again.

    Reading and writing take a second for each byte, and are recorded.
    """

    def __init__(self, start: float, looks: Iterable[float] = (), instructions=AVX2) -> None:
        self.instructions = instructions
        self.read_rows: list[list[int]] = []
        self._start = start
        self._looks = iter([*looks])
        self._last = start

    def undisturbed(self) -> Found:
        return dict.fromkeys(self.instructions.names, self._start)

    def __call__(self, threads: int | None = None) -> Found:
        self._last = next(self._looks, self._last)
        return {name: self._last * (1 if name == FMA else 2) for name in self.instructions.names}

    def read(self, memory: Tensor, rows: Tensor) -> float:
        self.read_rows.append(rows.tolist())
        return float(memory.shape[1] * len(rows))

    def write(self, memory: Tensor) -> float:
        return float(memory.numel())
