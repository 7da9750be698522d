"""`python -m torchmoe`: what a bug report needs to say about the installation."""

from __future__ import annotations

import platform

import torch

import torchmoe
from torchmoe import _library


def report() -> str:
    """The installation, one fact per line."""
    info = torchmoe.build_info()
    facts = {
        "torchmoe": f"{torchmoe.__version__} (git revision {info['git_revision']})",
        "library": str(_library.LIBRARY),
        "torch": f"{torch.__version__} (built for {info['torch']})",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "compiler": info["compiler"],
        "OpenMP": f"{info['openmp']} ({torch.get_num_threads()} threads)",
        "CUDA": f"built with {info['cuda']}, torch has {torch.version.cuda or 'none'}",
        "cmake prefix": torchmoe.cmake_prefix_path,
    }
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items())


if __name__ == "__main__":
    print(report())
