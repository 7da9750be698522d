"""Everything that can be said of the CUDA backend on this machine, in one markdown file.

Run it as `python -m benchmarks.cuda_report`, or `make report-cuda`: the tests marked cuda, Catch2's
where they are built, the benchmarks, and compute-sanitizer's four tools over
tests/python/cuda/sanitize.py. Steps of one phase run side by side; what is timed or looks at the
GPU's free memory runs alone. Each step has a time limit, nine minutes in all. A step that fails or
runs past its limit is recorded, and the exit status is 1 in the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.cuda_layer import environment

ROOT = Path(__file__).parents[1]
CPP_TESTS = ROOT / "build" / "tests" / "cpp" / "torchmoe_tests"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass(frozen=True)
class Step:
    """A command, its limit, and what of its output the report shows."""

    name: str
    command: list[str]
    seconds: float
    show: Callable[[list[str]], list[str]]
    good: Callable[[list[str]], bool] = lambda lines: True  # in addition to the exit status
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """How a step ended."""

    step: Step
    status: str  # "passed", or how it failed
    seconds: float
    lines: list[str]

    @property
    def passed(self) -> bool:
        """Whether the report may call it good."""
        return self.status == "passed"


def of_pytest(lines: list[str]) -> list[str]:
    """The failures and the last line."""
    failures = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    skipped = [line for line in lines if line.startswith("SKIPPED ")]
    return [*failures[:40], *skipped, *lines[-1:]]


def of_catch(lines: list[str]) -> list[str]:
    """The last lines."""
    return [line for line in lines if line.strip()][-3:]


def of_sanitizer(lines: list[str]) -> list[str]:
    """The summary, and the first findings."""
    own = [line.removeprefix("=========").strip() for line in lines if line.startswith("=====")]
    program = [line for line in lines if not line.startswith("=====")]
    return [*program[-3:], *own[:40], *(own[-1:] if len(own) > 40 else [])]


def nothing_found(lines: list[str]) -> bool:
    """A summary of nothing but zeros."""
    summaries = [line for line in lines if line.startswith("=====") and "SUMMARY" in line]
    return bool(summaries) and all(": 0 " in line for line in summaries)


def everything(lines: list[str]) -> list[str]:
    """The output as it is."""
    return lines


def pytest_step(name: str, seconds: float, *arguments: str) -> Step:
    """Some of the tests marked cuda."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "cuda", *arguments]
    return Step(f"pytest: {name}", command, seconds, of_pytest)


def phases() -> list[list[Step]]:
    """What runs, and what of it side by side."""
    folder = "tests/python/cuda"
    first = [pytest_step("memory", 60, f"{folder}/test_memory.py")]
    bench = [sys.executable, "-m", "benchmarks.cuda_layer"]
    second = [Step("benchmarks", bench, 150, everything)]
    ops = f"{folder}/test_ops.py"
    large = ("TestGateWeights", "TestLimitCapacity")
    third = [
        pytest_step("gate_weights", 300, ops, "-k", large[0]),
        pytest_step("limit_capacity", 300, ops, "-k", large[1]),
        pytest_step("the other ops", 300, ops, "-k", f"not ({' or '.join(large)})"),
        pytest_step("limit_capacity over tables", 300, f"{folder}/test_limit_capacity.py"),
        pytest_step("large sizes", 300, f"{folder}/test_large.py"),
        pytest_step("the layer", 300, f"{folder}/test_layer.py"),
    ]
    if CPP_TESTS.exists():
        third.append(Step("Catch2: [cuda]", [str(CPP_TESTS), "[cuda]"], 120, of_catch))
    third += [sanitizer_step(tool) for tool in TOOLS]
    return [first, second, third]


def sanitizer_step(tool: str) -> Step:
    """One of compute-sanitizer's tools over every op."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    script = "tests/python/cuda/sanitize.py"
    command = [program, "--tool", tool, "--error-exitcode", "1", sys.executable, script]
    path = os.pathsep.join((str(ROOT / "tests" / "python"), os.environ.get("PYTHONPATH", "")))
    # A separate allocation for every tensor, so that no tensor's neighbour is valid memory.
    alone = {"PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(f"compute-sanitizer: {tool}", command, 300, of_sanitizer, nothing_found, alone)


def run(step: Step) -> Result:
    """Runs one in a process group of its own, which ends with its limit."""
    begin = time.monotonic()
    try:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env={**os.environ, **step.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return Result(step, "could not start", 0.0, [str(error)])
    try:
        output, _ = process.communicate(timeout=step.seconds)
        passed = process.returncode == 0 and step.good(output.splitlines())
        status = "passed" if passed else f"failed: status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = f"failed: ran past its {step.seconds:.0f} s"
    print(f"cuda_report: {step.name}: {status}", file=sys.stderr, flush=True)
    return Result(step, status, time.monotonic() - begin, output.splitlines())


def markdown(described: dict[str, str], results: list[Result]) -> str:
    """The report."""
    good = sum(result.passed for result in results)
    lines = [
        "# The CUDA backend on one GPU",
        "",
        "Written by `make report-cuda`. Where times are measured, no other step ran.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in described.items()),
        "",
        f"{good} of {len(results)} steps passed.",
        "",
        "| step | result | seconds |",
        "|---|---|---:|",
        *(f"| {r.step.name} | {r.status} | {r.seconds:.0f} |" for r in results),
    ]
    for result in results:
        lines += ["", f"## {result.step.name}", ""]
        shown = result.step.show(result.lines)
        if result.passed and result.step.show is everything:
            lines += shown
        else:
            tail = [] if result.passed else ["", *result.lines[-20:]]
            lines += ["```", *shown, *tail, "```"]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Runs every phase and writes the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda_report",
        description="Tests, times and sanitizes the CUDA backend, and writes one markdown file.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "docs" / "measured_cuda.md",
        help="default docs/measured_cuda.md",
    )
    parser.add_argument("--revision", help="where the sources are no checkout: what they are")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            "cuda_report: needs a CUDA device, and torch.cuda.is_available() is false",
            file=sys.stderr,
        )
        return 1
    described = environment()
    if args.revision:
        described["revision"] = args.revision
    results: list[Result] = []
    for steps in phases():
        with ThreadPoolExecutor(len(steps)) as pool:
            results += pool.map(run, steps)
        # After each phase, so that an interrupted run leaves what it has found.
        args.output.write_text(markdown(described, results), encoding="utf-8")
    print(f"wrote {args.output}", file=sys.stderr)
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
