"""How long does it take to decide who is dropped and who goes where instead?

Run it as `python -m benchmarks.limit_capacity`. The hardest case: every token wants the same
experts, so that nearly every slot overflows, and the other experts have just enough room for all.
Each rule is timed at a growing number of tokens; where the time per slot stays what it is, the
time is linear. The fastest of the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchmoe import ops

FEWER = (16, 4, 1)  # the number of tokens over these


@dataclass(frozen=True)
class Result:
    """One rule at one size."""

    rule: str
    tokens: int
    seconds: float
    nanoseconds_per_slot: float


def rules(experts: int, scores: Tensor, priority: Tensor) -> dict[str, dict[str, Any]]:
    """The arguments of each."""
    rerouted = {"overflow": "next_best", "scores": scores}
    backup = (torch.arange(experts) + 1) % experts
    return {
        "drop, choice": {},
        "drop, token": {"order": "token"},
        "drop, random": {"priority": priority},
        "next_best, choice": rerouted,
        "next_best, token": {**rerouted, "order": "token"},
        "next_best, random": {**rerouted, "priority": priority},
        "backup, choice": {**rerouted, "overflow": "backup", "backup": backup},
    }


def measure(tokens: int, experts: int, top_k: int, rounds: int) -> list[Result]:
    """Every rule on tokens that all choose the first top_k experts."""
    torch.manual_seed(0)
    scores, priority = torch.randn(tokens, experts), torch.rand(tokens, top_k)
    indices = torch.arange(top_k).expand(tokens, top_k).contiguous()
    capacity = torch.full((experts,), -(-tokens * top_k // experts))
    results = []
    for name, arguments in rules(experts, scores, priority).items():
        call = partial(ops.limit_capacity, indices, capacity, **arguments)
        seconds = fastest(call, rounds)
        results.append(Result(name, tokens, seconds, 1e9 * seconds / (tokens * top_k)))
    return results


def fastest(call: Callable[[], Tensor], rounds: int) -> float:
    """Seconds of the fastest round."""
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.limit_capacity",
        description="Times limit_capacity where nearly every slot overflows.",
    )
    parser.add_argument("--tokens", type=int, default=1_000_000, help="the most (default 1000000)")
    parser.add_argument("--experts", type=int, default=256, help="default 256")
    parser.add_argument("--top-k", type=int, default=8, help="default 8")
    parser.add_argument("--rounds", type=int, default=3, help="of each; the fastest counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the numbers, too")
    options = parser.parse_args(arguments)
    sizes = [options.tokens // fewer for fewer in FEWER]
    results = [measure(tokens, options.experts, options.top_k, options.rounds) for tokens in sizes]
    print(f"E = {options.experts}, K = {options.top_k}: seconds (nanoseconds a slot)\n")
    print(f"{'':20}" + "".join(f"{f'T = {tokens:,}':>22}" for tokens in sizes))
    for row in zip(*results, strict=True):
        cells = (f"{one.seconds:.3f} ({one.nanoseconds_per_slot:.0f})" for one in row)
        print(f"{row[0].rule:20}" + "".join(f"{cell:>22}" for cell in cells))
    if options.json:
        found = [asdict(one) for size in results for one in size]
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
