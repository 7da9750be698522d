"""`python -m torchmoe`: what a bug report needs to say about the installation."""

from __future__ import annotations

import platform
import sys

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


def main() -> int:
    """Prints the report."""
    try:
        print(report(), flush=True)
    except OSError as error:  # a full disk, or a reader that went away
        sys.stdout = None  # Python would try once more when it exits
        if isinstance(error, BrokenPipeError):
            return 1
        print(f"torchmoe: cannot write its report: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
