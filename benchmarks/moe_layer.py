"""How fast is one mixture-of-experts layer, forward and backward?

Run it as `python -m benchmarks.moe_layer`. Side by side are timed torchmoe, Transformers' Mixtral
block, the plain loop of a textbook and the dense bound, which `contenders` describes; in a 16-bit
type the same layer of torchmoe in float32, too. These ratios answer, each of one block's fastest
rounds or medians:

- U, the share of the probed peak: the FLOPs of the experts' products, 18 T K H I for a step and 6 T
  K H I for inference, over the time of everything, routing included. The peak is that of float32,
  in bfloat16 that of the bfloat16 dot product where the kernels may use one (`peaks`);
- D, the time over that of the dense bound;
- P, the time of the fastest peer over ours.

Every round has the same tokens, and then, in members of the block of their own, fresh ones: tokens
that no contender has seen. Then each expert gets another number of rows than before, and libraries
that prepare a kernel for each number of rows show what that takes. No two contenders get the same
fresh tokens, as the kernels that one has prepared would serve another. Of fresh rounds medians are
quoted: the fastest is the one that happened to meet the most numbers of rows a second time.

Like `make train`, the process keeps the memory that it frees (`torchmoe.keep_freed_memory`), for
every contender.

A forward-only block runs under `torch.inference_mode`. At a few tokens it is bound by reading the
matrices of the experts that the tokens choose, which is timed (`traffic`): the bound's column is
the time over it, and the next the microseconds beyond it. The dense bound reads one expert's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torchmoe
from benchmarks.clock import Block, Clock, Run, Times
from benchmarks.contenders import (
    IN_FLOAT32,
    LOOP,
    OURS,
    TRANSFORMERS,
    DenseBound,
    Shape,
    Step,
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
from benchmarks.peaks import FMA, Peaks
from benchmarks.traffic import OP, READS, OpAlone, WeightReads

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FRESH = ", fresh tokens"  # ends the name of a member of a block that has others in each round


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
    Case(Shape(4, 512, 1024, 8, 2), forward_only=True),
    Case(Shape(16, 512, 1024, 8, 2), forward_only=True),
)


@dataclass(frozen=True)
class Row:
    """What is said of one contender; None is what does not apply to it."""

    min_ms: float
    median_ms: float
    spread: float
    fresh_ms: float | None  # the median with fresh tokens
    min_over_dense: float
    median_over_dense: float
    min_over_bound: float | None
    us_over_bound: float | None
    gflops: float | None
    share_of_peak: float | None
    rounds: int


@dataclass(frozen=True)
class Result:
    """One block."""

    case: Case
    block: Block
    dense: str  # the name of the dense bound
    peak: str  # the name of the peak that U is a share of

    @property
    def rows(self) -> dict[str, Row]:
        """By contender."""
        return {name: self._row(name) for name in self.block.times if not name.endswith(FRESH)}

    def _row(self, name: str) -> Row:
        times, dense = self.block.times[name], self.block.times[self.dense]
        fresh, bound = self.block.times.get(name + FRESH), self.block.times.get(READS)
        if name in (IN_FLOAT32, self.dense):  # which read other bytes
            bound = None
        rate = None if name == READS else self.case.flops / times.low
        return Row(
            min_ms=1e3 * times.low,
            median_ms=1e3 * times.middle,
            spread=times.spread,
            fresh_ms=None if fresh is None else 1e3 * fresh.middle,
            min_over_dense=times.low / dense.low,
            median_over_dense=times.middle / dense.middle,
            min_over_bound=None if bound is None else times.low / bound.low,
            us_over_bound=None if bound is None else 1e6 * (times.low - bound.low),
            gflops=None if rate is None else rate / 1e9,
            share_of_peak=None if rate is None else rate / self.peak_of(name),
            rounds=len(times.seconds),
        )

    def peak_of(self, name: str) -> float:
        """FLOP/s that bound a contender."""
        return self.block.peak(FMA if name == IN_FLOAT32 else self.peak)

    def fastest_peer(
        self, seconds: Callable[[Times], float], ending: str = ""
    ) -> tuple[float, str] | None:
        """P and the peer that it is of, by minima or medians, with the same or fresh tokens."""
        peers = [name for name in self.rows if name == LOOP or name.startswith("transformers")]
        if not peers:
            return None
        times = {name: seconds(self.block.times[name + ending]) for name in (OURS, *peers)}
        best = min(peers, key=times.__getitem__)
        return times[best] / times[OURS], best

    @property
    def over_float32(self) -> float | None:
        """The time in a 16-bit type over that in float32, where both were measured."""
        return self.block.ratio(OURS, IN_FLOAT32) if IN_FLOAT32 in self.block.times else None


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
    members: dict[str, Step]
    if case.forward_only:
        members = {one.name: one.infer for one in (ours, *peers)}
        members |= {READS: WeightReads(shape, ours, clock.peaks).infer, OP: OpAlone(ours).infer}
    else:
        members = {one.name: partial(one.step, grad=grad) for one in (ours, *peers)}
    runs: dict[str, Run] = {dense.name: dense.run, **with_tokens(members, lambda: x)}
    if dtype != torch.float32:
        wide, wide_x, wide_grad = in_float32(ours), x.detach().float(), grad.float()
        step: Step = wide.infer if case.forward_only else partial(wide.step, grad=wide_grad)
        runs[IN_FLOAT32] = partial(step, wide_x.requires_grad_())
    # After all others, so that no contender's weights are those that were read last.
    runs |= with_tokens(members, lambda: inputs(shape, dtype)[0], FRESH)
    peak = clock.peaks.instructions.peak_of(dtype)
    return Result(case, clock.measure(str(case), runs), dense.name, peak)


def with_tokens(
    members: Mapping[str, Step], tokens: Callable[[], Tensor], ending: str = ""
) -> dict[str, Run]:
    """Each member's run on tokens that are made before its clock runs."""

    def run(step: Step) -> float:
        return step(tokens())

    return {name + ending: partial(run, step) for name, step in members.items()}


COLUMNS = {
    "min ms": ("min_ms", ".2f"),
    "median ms": ("median_ms", ".2f"),
    "p90/min": ("spread", ".2f"),
    "fresh ms": ("fresh_ms", ".2f"),
    "D min": ("min_over_dense", ".2f"),
    "D median": ("median_over_dense", ".2f"),
    "over reads": ("min_over_bound", ".2f"),
    "us over": ("us_over_bound", ".0f"),
    "GFLOP/s": ("gflops", ".1f"),
    "U": ("share_of_peak", ".3f"),
    "rounds": ("rounds", "d"),
}


def cells(row: Row) -> list[str]:
    """One line of the table, in the order of COLUMNS."""
    values = ((getattr(row, key), form) for key, form in COLUMNS.values())
    return ["" if value is None else format(value, form) for value, form in values]


def conclusions(result: Result) -> list[str]:
    """The ratios that take two contenders."""
    lines = []
    for what, seconds, ending in (
        ("minima", attrgetter("low"), ""),
        ("medians", attrgetter("middle"), ""),
        ("medians, fresh tokens", attrgetter("middle"), FRESH),
    ):
        if (found := result.fastest_peer(seconds, ending)) is not None:
            lines.append(f"P = {found[0]:.2f} ({what}): {found[1]} over {OURS}")
    if (ratio := result.over_float32) is not None:
        lines.append(f"16-bit over float32 = {ratio:.2f} (minima), both {OURS}")
    return lines


def print_result(result: Result) -> None:
    """One table."""
    sizes = "  ".join(f"{name} {size}" for name, size in asdict(result.case.shape).items())
    what = "forward only" if result.case.forward_only else "forward + backward"
    print(f"\n{sizes}  {what}  ({result.case.flops / 1e9:.2g} GFLOP)")
    print(f"  {result.block}")
    header, table = [*COLUMNS], {name: cells(row) for name, row in result.rows.items()}
    used = [place for place in range(len(header)) if any(row[place] for row in table.values())]
    for name, row in {"": header, **table}.items():
        print(f"  {name:24}" + "".join(f"{row[place]:>11}" for place in used))
    for line in conclusions(result):
        print(f"  {line}")
    sys.stdout.flush()


def environment(clock: Clock, dtype: str) -> dict[str, str | int]:
    """What a reader needs to judge the numbers."""
    return {
        **machine(),
        "rounds": clock.rounds,
        "dtype": dtype,
        "peaks": str(clock.peaks.instructions),
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.moe_layer",
        description="Times one MoE layer next to Transformers, a plain loop and torch.mm.",
    )
    add_shape_option(parser, "four shapes, and three of few tokens forward only")
    parser.add_argument("--forward-only", action="store_true", help="inference only")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--rounds", type=positive, default=10, help="timed runs of each (default: 10)"
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
        "peak": result.peak,
        "summary": {name: asdict(row) for name, row in result.rows.items()},
        "seconds": {name: times.seconds for name, times in result.block.times.items()},
    }


def main(argv: list[str] | None = None) -> None:
    """Measures, prints and, on request, writes."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torchmoe.keep_freed_memory()
    installed = transformers_version() is not None
    peers = tuple(dict.fromkeys(args.peer or TRANSFORMERS)) if installed else ()
    clock = Clock(args.rounds, Peaks())
    described = environment(clock, args.dtype)
    print("One MoE layer. D: time over that of dense torch.mm of its FLOPs. U: share of the peak.")
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
    if (warning := clock.warning()) is not None:
        print(f"\n{warning}")
    if args.json:
        report = {
            "environment": described,
            "results": [as_json(result) for result in results],
            "warning": warning,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")
        print(f"\nwrote {args.json}", file=sys.stderr)
    if args.figure:
        from benchmarks.figures import layers, save

        save(layers(results), args.figure)
        print(f"\nwrote {args.figure}", file=sys.stderr)


if __name__ == "__main__":
    main()
