"""The machine that the numbers were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import torchmoe
from benchmarks.contenders import transformers_version

# Environment variables that limit the instructions of torch's and torchmoe's kernels, and those of
# the libraries that multiply matrices for torch, which the first does not reach.
LIMITS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")


def machine() -> dict[str, str | int]:
    """The processor, the threads, and the versions of what runs on it."""
    return {
        "torchmoe": torchmoe.__version__,
        "torch": torch.__version__,
        "transformers": transformers_version() or "not installed",
        "python": platform.python_version(),
        "processor": processor(),
        "cores": os.cpu_count() or 1,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "limits": " ".join(f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ)
        or "none",
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """The model's name, as the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
