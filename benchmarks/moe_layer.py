"""How fast is one mixture-of-experts layer, forward and backward?

Run it as `python -m benchmarks.moe_layer`. Side by side are timed torchmoe, Transformers' Mixtral
block, the plain loop of a textbook and the dense bound, which `contenders` describes; in a 16-bit
type the same layer of torchmoe in float32, too. Three ratios answer, each of one block's fastest
rounds or medians:

- U, the share of the FMA peak: the FLOPs of the experts' products, 18 T K H I for a step and 6 T K
  H I for inference, over the time of everything, routing included, and the probed float32 peak;
- D, the time over that of the dense bound;
- P, the time of the better of Transformers' two implementations over ours.

A forward-only block runs under `torch.inference_mode`. At a few tokens it is bound by reading the
experts' weights, of which the dense bound reads one expert's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import Block, Clock, Run, Times
from benchmarks.contenders import (
    OURS,
    TRANSFORMERS,
    Contender,
    DenseBound,
    Shape,
    add_shape_option,
    check_agreement,
    in_float32,
    inputs,
    mixtral_block,
    our_layer,
    plain_loop,
    positive,
    transformers_version,
)
from benchmarks.machine import machine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """What a block measures."""

    shape: Shape
    forward_only: bool = False

    @property
    def flops(self) -> int:
        """Floating-point operations of the experts' products."""
        return self.shape.flops // 3 if self.forward_only else self.shape.flops

    def __str__(self) -> str:
        """The sizes, and whether there is a backward pass."""
        return f"{self.shape}{' forward only' if self.forward_only else ''}"


DEFAULT_CASES = (
    Case(Shape(1024, 256, 512, 8, 2)),
    Case(Shape(2048, 512, 1024, 8, 2)),
    Case(Shape(2048, 512, 256, 64, 8)),
    Case(Shape(1024, 512, 1792, 8, 2)),
    Case(Shape(1, 512, 1024, 8, 2), forward_only=True),
    Case(Shape(16, 512, 1024, 8, 2), forward_only=True),
)


@dataclass(frozen=True)
class Row:
    """What is said of one contender."""

    min_ms: float
    median_ms: float
    spread: float
    min_over_dense: float
    median_over_dense: float
    gflops: float
    share_of_peak: float
    rounds: int


@dataclass(frozen=True)
class Result:
    """One block."""

    case: Case
    block: Block
    dense: str  # the name of the dense bound

    @property
    def rows(self) -> dict[str, Row]:
        """By contender."""
        return {name: self._row(times) for name, times in self.block.times.items()}

    def _row(self, times: Times) -> Row:
        dense = self.block.times[self.dense]
        rate = self.case.flops / times.low
        return Row(
            min_ms=1e3 * times.low,
            median_ms=1e3 * times.middle,
            spread=times.spread,
            min_over_dense=times.low / dense.low,
            median_over_dense=times.middle / dense.middle,
            gflops=rate / 1e9,
            share_of_peak=rate / self.block.peak,
            rounds=len(times.seconds),
        )

    @property
    def better_peer(self) -> tuple[str, float, float] | None:
        """The faster of Transformers' implementations and P by minima and by medians."""
        peers = [name for name in self.block.times if name.startswith("transformers")]
        if not peers:
            return None
        times = self.block.times
        ours, peer = times[OURS], min(peers, key=lambda name: times[name].low)
        middle = min(times[name].middle for name in peers)
        return peer, times[peer].low / ours.low, middle / ours.middle

    @property
    def over_float32(self) -> float | None:
        """The time in a 16-bit type over that in float32, where both were measured."""
        name = f"{OURS} float32"
        return self.block.ratio(OURS, name) if name in self.block.times else None


def measure(
    case: Case, dtype: torch.dtype, transformers: Sequence[str], clock: Clock, *, loop: bool = True
) -> Result:
    """Times every contender on one shape, each peer after it was shown to agree."""
    shape = case.shape
    ours = our_layer(shape, dtype)
    dense = DenseBound(shape, dtype, case.forward_only)
    peers = [mixtral_block(shape, ours.module, name) for name in transformers if shape.top_k > 1]
    if loop:
        peers.append(plain_loop(ours))
    for peer in peers:
        check_agreement(shape, ours, peer, dtype)
    x, grad = inputs(shape, dtype)
    runs: dict[str, Run] = {dense.name: dense.run}
    for contender in (ours, *peers):
        runs[contender.name] = bound_to(contender, x, grad, case)
    if dtype != torch.float32:
        wide = in_float32(ours)
        x, grad = x.detach().float().requires_grad_(), grad.float()
        runs[wide.name] = bound_to(wide, x, grad, case)
    return Result(case, clock.measure(runs), dense.name)


def bound_to(contender: Contender, x: torch.Tensor, grad: torch.Tensor, case: Case) -> Run:
    """The contender's run on these tokens."""
    return partial(contender.infer, x) if case.forward_only else partial(contender.step, x, grad)


COLUMNS = {
    "min ms": ("min_ms", ".2f"),
    "median ms": ("median_ms", ".2f"),
    "p90/min": ("spread", ".2f"),
    "D min": ("min_over_dense", ".2f"),
    "D median": ("median_over_dense", ".2f"),
    "GFLOP/s": ("gflops", ".1f"),
    "U": ("share_of_peak", ".3f"),
    "rounds": ("rounds", "d"),
}


def cells(row: Row) -> list[str]:
    """One line of the table, in the order of COLUMNS."""
    return [format(getattr(row, key), form) for key, form in COLUMNS.values()]


def conclusions(result: Result) -> list[str]:
    """The ratios that take two contenders."""
    lines = []
    if (peer := result.better_peer) is not None:
        lines.append(f"P = {peer[1]:.2f} (minima), {peer[2]:.2f} (medians): {peer[0]} over {OURS}")
    if (ratio := result.over_float32) is not None:
        lines.append(f"16-bit over float32 = {ratio:.2f} (minima), both {OURS}")
    return lines


def print_result(result: Result) -> None:
    """One table."""
    sizes = "  ".join(f"{name} {size}" for name, size in asdict(result.case.shape).items())
    what = "forward only" if result.case.forward_only else "forward + backward"
    print(f"\n{sizes}  {what}  ({result.case.flops / 1e9:.2g} GFLOP)")
    print(f"  {result.block}")
    print(f"  {'':24}" + "".join(f"{title:>11}" for title in COLUMNS))
    for name, row in result.rows.items():
        print(f"  {name:24}" + "".join(f"{cell:>11}" for cell in cells(row)))
    for line in conclusions(result):
        print(f"  {line}")
    sys.stdout.flush()


def environment(clock: Clock, dtype: str) -> dict[str, str | int]:
    """What a reader needs to judge the numbers."""
    return {**machine(), "rounds": clock.rounds, "dtype": dtype}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.moe_layer",
        description="Times one MoE layer next to Transformers, a plain loop and torch.mm.",
    )
    add_shape_option(parser, "four shapes, and two of few tokens forward only")
    parser.add_argument("--forward-only", action="store_true", help="inference only")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--rounds", type=positive, default=14, help="timed runs of each (default: 14)"
    )
    parser.add_argument(
        "--threads", type=positive, help="threads of torch (default: torch's own choice)"
    )
    parser.add_argument(
        "--peer",
        choices=TRANSFORMERS,
        action="append",
        help="a Transformers implementation; may be repeated (default: both)",
    )
    parser.add_argument("--no-peers", action="store_true", help="only torchmoe and the dense bound")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the numbers there")
    parser.add_argument("--figure", type=Path, metavar="PATH.png", help="also draw them there")
    args = parser.parse_args(argv)
    if args.no_peers and args.peer:
        parser.error("--no-peers must not be given with --peer")
    if args.figure and importlib.util.find_spec("matplotlib") is None:
        parser.error("--figure needs matplotlib: pip install matplotlib")
    return args


def cases_of(args: argparse.Namespace) -> list[Case]:
    """What the command line asks for."""
    if args.shape:
        return [Case(shape, args.forward_only) for shape in args.shape]
    return [Case(case.shape, case.forward_only or args.forward_only) for case in DEFAULT_CASES]


def as_json(result: Result) -> dict[str, Any]:
    """Every number of a block."""
    return {
        **asdict(result.case),
        "probes_gflops": [result.block.before, result.block.after],
        "repeats": result.block.repeats,
        "throttled": result.block.throttled,
        "summary": {name: asdict(row) for name, row in result.rows.items()},
        "seconds": {name: times.seconds for name, times in result.block.times.items()},
    }


def main(argv: list[str] | None = None) -> None:
    """Measures, prints and, on request, writes."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    installed = transformers_version() is not None
    peers = tuple(dict.fromkeys(args.peer or TRANSFORMERS)) if installed else ()
    clock = Clock(args.rounds)
    described = environment(clock, args.dtype)
    print("One MoE layer. D: time over that of dense torch.mm of its FLOPs. U: share of FMA peak.")
    print("  ".join(f"{name} {value}" for name, value in described.items()))
    if not installed and not args.no_peers:
        print("note: without Transformers, which is missing: pip install transformers")
    results = []
    for case in cases_of(args):
        if peers and case.shape.top_k == 1:
            print("note: K = 1 without Transformers, where Mixtral's weight is always 1")
        torch.manual_seed(args.seed)
        wanted = () if args.no_peers else peers
        result = measure(case, DTYPES[args.dtype], wanted, clock, loop=not args.no_peers)
        print_result(result)
        results.append(result)
    if args.json:
        report = {"environment": described, "results": [as_json(result) for result in results]}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
        print(f"\nwrote {args.json}", file=sys.stderr)
    if args.figure:
        from benchmarks.figures import layers, save

        save(layers(results), args.figure)
        print(f"\nwrote {args.figure}", file=sys.stderr)


if __name__ == "__main__":
    main()
