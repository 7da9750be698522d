"""What does including torchmoe's headers cost a C++ file that includes torch's?

Run it as `python -m benchmarks.header_time` where the package is built and a C++ compiler is found
($CXX, else c++). The compilations take turns; the fastest of the rounds counts, in seconds of the
processor, which what else runs disturbs less than seconds of the clock.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import torchmoe
from benchmarks.machine import processor

ROOT = Path(torch.__file__).parent / "include"
FILES = {
    "torch/torch.h": "#include <torch/torch.h>\n",
    "torchmoe/torchmoe.h": "#include <torchmoe/torchmoe.h>\n",
    "both": "#include <torch/torch.h>\n#include <torchmoe/torchmoe.h>\n",
    "both and torchmoe/testing.h": (
        "#include <torch/torch.h>\n#include <torchmoe/testing.h>\n#include <torchmoe/torchmoe.h>\n"
    ),
}


def compile_time(source: Path) -> float:
    """Seconds of the processor for one file, from source to object."""
    includes = [ROOT, ROOT / "torch" / "csrc" / "api" / "include"]
    includes.append(Path(torchmoe.__file__).parent / "include")
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O2", "-fPIC", "-c", str(source)]
    command += [f"-isystem{folder}" for folder in includes]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "-o", str(source.with_suffix(".o"))], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(rounds: int) -> dict[str, float]:
    """Seconds of each file, the fastest of its rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in FILES}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, text in FILES.items():
                source = Path(folder) / "consumer.cpp"
                source.write_text(text + "int main() { return 0; }\n")
                seconds[name].append(compile_time(source))
    return {name: min(found) for name, found in seconds.items()}


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints a line for each file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.header_time",
        description="Times the compilation of files that include torchmoe's headers.",
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each; the fastest counts")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    print(processor())
    results = measure(options.rounds)
    for name, seconds in results.items():
        ratio = seconds / results["torch/torch.h"]
        print(f"{name:28}{seconds:8.1f} s{ratio:8.2f} times torch/torch.h")
    return 0


if __name__ == "__main__":
    sys.exit(main())
