"""What does `import torchmoe` cost a program that imports torch anyway?

Run it as `python -m benchmarks.import_time`. Each import happens in a process of its own, and the
processes take turns: torch; torchmoe, which imports torch; and torchmoe where torch has been
imported before the clock starts, which is the answer. A process times its import alone, without the
interpreter's start and end. The fastest of the rounds counts; a first round, which may read from
the disk, does not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

TIMED = "import time; begin = time.perf_counter(); import {}; print(time.perf_counter() - begin)"
IMPORTS = {
    "torch": TIMED.format("torch"),
    "torchmoe": TIMED.format("torchmoe"),
    "torchmoe, after torch": "import torch; " + TIMED.format("torchmoe"),
}


def in_a_process(code: str) -> Callable[[], float]:
    """Runs the code in a new interpreter that finds what this one finds."""

    def run() -> float:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        output = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=True, env=environment
        ).stdout
        return float(output)

    return run


def measure(rounds: int) -> dict[str, float]:
    """Seconds of each import, the fastest of its rounds."""
    runs = {name: in_a_process(code) for name, code in IMPORTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            found = run()
            if turn > 0:
                seconds[name].append(found)
    return {name: min(found) for name, found in seconds.items()}


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints a line for each import."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.import_time",
        description="Times the import of torchmoe next to torch's own.",
    )
    parser.add_argument("--rounds", type=int, default=10, help="of each; the fastest counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the numbers, too")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    results = measure(options.rounds)
    for name, seconds in results.items():
        print(f"{name:24}{seconds:8.3f} s")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
