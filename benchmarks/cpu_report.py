"""Everything that can be said of the CPU backend's speed on this machine, in one markdown file.

Run it as `python -m benchmarks.cpu_report`, four minutes or so on two quiet cores. One section
answers one question, with as many threads as torch has by itself unless it is about threads, and
measures as `benchmarks.clock` says. `--section NAME` prints one section and leaves the report as it
is.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import torchmoe
from benchmarks.clock import Block, Clock
from benchmarks.contenders import positive
from benchmarks.markdown import table
from benchmarks.moe_layer import environment
from benchmarks.peaks import Peaks

if TYPE_CHECKING:
    from benchmarks.cpu.section import Section, Settings

ROOT = Path(__file__).parents[1]
COMMAND = "python -m benchmarks.cpu_report"


def sections() -> dict[str, Callable[[Settings], Section]]:
    """Every section by its name; imported when called, as they draw with matplotlib."""
    from benchmarks.cpu.dtypes import section_dtypes
    from benchmarks.cpu.growth import section_growth
    from benchmarks.cpu.layers import section_layers
    from benchmarks.cpu.loads import section_loads
    from benchmarks.cpu.many_experts import section_many_experts
    from benchmarks.cpu.memory import section_memory
    from benchmarks.cpu.odd_sizes import section_odd_sizes
    from benchmarks.cpu.products import section_products
    from benchmarks.cpu.rounding import section_rounding
    from benchmarks.cpu.stages import section_stages
    from benchmarks.cpu.threads import section_threads

    return {
        "memory": section_memory,
        "layers": section_layers,
        "products": section_products,
        "stages": section_stages,
        "threads": section_threads,
        "loads": section_loads,
        "dtypes": section_dtypes,
        "rounding": section_rounding,
        "many_experts": section_many_experts,
        "odd_sizes": section_odd_sizes,
        "growth": section_growth,
    }


def markdown(name: str, section: Section, blocks: Sequence[Block]) -> str:
    """One section, with what befell its measurement."""
    repeated = sum(block.repeats > 0 for block in blocks)
    throttled = sum(block.throttled for block in blocks)
    lines = [f"## {section.title}", "", section.about, ""]
    for part in section.parts:
        lines += [part, ""]
    for file in section.figures:
        lines += [f"![{section.title}](figures/{file})", ""]
    measured = f"`{COMMAND} --section {name}`"
    if blocks:
        low, high = (f"{pick(b.peak() for b in blocks) / 1e9:.0f}" for pick in (min, max))
        measured += (
            f"; blocks: {len(blocks)}, with an FMA peak of {low} to {high} GFLOP/s; "
            f"measured again: {repeated}, of which throttled even so: {throttled}"
        )
    return "\n".join([*lines, f"{measured}.", ""])


def heading(clock: Clock) -> str:
    """The machine, and how all was measured."""
    described = environment(clock, "float32 where nothing else is said")
    rows = [[name, str(value)] for name, value in described.items()]
    return "\n".join(
        [
            "# Speed on a CPU",
            "",
            f"Written by `{COMMAND}`. What a table compares was timed turn by turn in one process, "
            "between two probes of the machine's peaks; a block whose probes fell below "
            "85 % of the best was measured again, up to three times. Times are those of the "
            "fastest round where nothing else is said.",
            "",
            table(["", ""], rows, texts=2),
            "",
        ]
    )


def with_warning(text: str, warning: str | None) -> str:
    """The report, and at its end what the run as a whole says of its blocks."""
    return text if warning is None else f"{text}\n{warning}\n"


def parse_args(argv: list[str] | None, names: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="Measures the CPU backend and writes one markdown file."
    )
    parser.add_argument(
        "--section",
        choices=names,
        action="append",
        help="measures this one and prints it; may be repeated (default: all)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where measured_cpu.md and figures/ go (default: docs, with --section nowhere)",
    )
    parser.add_argument(
        "--rounds", type=positive, default=10, help="timed runs of each (default: 10)"
    )
    parser.add_argument("--quick", action="store_true", help="a rehearsal: two rounds, few tokens")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measures, and writes or prints."""
    if importlib.util.find_spec("matplotlib") is None:
        print("cpu_report: needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 1
    from benchmarks import figures
    from benchmarks.cpu.section import Settings

    known = sections()
    args = parse_args(argv, list(known))
    out: Path | None = args.out or (None if args.section else ROOT / "docs")
    torchmoe.keep_freed_memory()
    peaks = Peaks()
    clock = Clock(2, peaks, repeats=0) if args.quick else Clock(args.rounds, peaks)
    settings = Settings(clock, args.quick)
    text = heading(clock)
    warning = None
    for name in args.section or known:
        begin, seen = time.monotonic(), len(clock.blocks)
        torch.manual_seed(0)
        section = known[name](settings)
        text += "\n" + markdown(name, section, clock.blocks[seen:])
        print(f"cpu_report: {name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        warning = clock.warning()
        if out is not None:
            (out / "figures").mkdir(parents=True, exist_ok=True)
            # After each section, so that an interrupted run leaves what it has found.
            (out / "measured_cpu.md").write_text(with_warning(text, warning), encoding="utf-8")
            for file, figure in section.figures.items():
                figures.save(figure, out / "figures" / file)
    if out is None:
        print(with_warning(text, warning))
    else:
        print(f"wrote {out / 'measured_cpu.md'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
