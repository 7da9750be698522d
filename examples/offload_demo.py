"""Layers of experts that need more memory than they get, and what that costs.

A few layers of experts are written to files and taken out of memory. Then tokens go through them
one after the other, as when a model writes text: with room for a quarter, a half, three quarters
and all of each layer's experts. The table says how many tokens a second that gives, how often an
expert was in memory when it was needed, how much was read from the files for each token, and how
many tokens a second `plan_offload` predicts for the experts alone, from the hit rate and what
`measure_machine` measured. The last two columns are with the layers linked, so that each reads
ahead what the next one's router would choose for its tokens: how much of what was needed that
foresaw, and the tokens a second.
The outputs are those of experts in memory, bit for bit, which is checked.

With --figure the table is a picture, too.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which `python -P` leaves out

import torchmoe
import torchmoe.offload
from torchmoe.nn import Experts, MoE
from torchmoe.offload import ExpertStore, Machine, OffloadedExperts
from training import terminal
from training.arguments import Parser, number

H, INNER, E, K = 512, 1024, 32, 2  # 6 MB an expert, 200 MB a layer
SHARES = (25, 50, 75, 100)  # percent of a layer's experts that have room
STAYS = 0.8  # of a token in the next one: text stays with a topic for a while
FIGURE = Path("runs/offload_demo.png")
BLUE, ORANGE = "#0072B2", "#E69F00"  # of Okabe and Ito
EXAMPLES = """\
examples:
  offload_demo.py                             four layers, 800 MB of experts
  offload_demo.py --figure                    and as a picture
  offload_demo.py --layers 2 --tokens 50      smaller and shorter
  offload_demo.py --folder /mnt/disk          the files on another disk
"""


class Row(NamedTuple):
    """What was measured with one budget."""

    percent: int
    megabytes: float  # the budget of all layers
    tokens_per_second: float
    hit_rate: float
    megabytes_read: float  # for a token
    predicted: float  # tokens per second
    foreseen: float  # of the experts needed, with the layers linked
    linked_tokens_per_second: float


# ---- the model: T tokens, H hidden size, E experts in each layer


def tokens(count: int) -> Tensor:
    """[T, H]: each token is like the one before."""
    steps = torch.randn(count, H)
    for token in range(1, count):
        steps[token] = STAYS * steps[token - 1] + math.sqrt(1 - STAYS**2) * steps[token]
    return steps


def write_layers(count: int, x: Tensor, folder: Path) -> tuple[list[MoE], Tensor]:
    """Layers whose experts lie in files, and what they give from memory, [T, H].

    One layer at a time has its experts in memory. A token's output does not depend on the other
    tokens, so that here all of them may go through a layer together.
    """
    layers = []
    for layer in range(count):
        experts = Experts(H, INNER, E)
        moe = MoE(H, None, E, K, experts=experts).requires_grad_(False).eval()
        with torch.inference_mode():
            x = x + moe(x).hidden_states
        torchmoe.offload.write_store(file(folder, layer), experts)
        experts.to("meta")  # keeps the sizes and lets go of the numbers
        layers.append(moe)
    return layers, x


def file(folder: Path, layer: int) -> Path:
    """Where a layer's experts are."""
    return folder / f"layer{layer}.safetensors"


def sizes_only() -> Experts:
    """What a layer's experts look like, without the numbers."""
    return Experts(H, INNER, E, device="meta").requires_grad_(False)


# ---- one budget


def run(
    layers: Sequence[MoE], x: Tensor, folder: Path, budget: int, *, linked: bool
) -> tuple[float, list[OffloadedExperts], Tensor]:
    """Lets the tokens through the layers, one after the other; linked ones read ahead.

    Returns:
        The seconds that it took, the experts with what they counted, and the outputs [T, H].
    """
    experts = [
        torchmoe.offload.offload(sizes_only(), budget=budget, store=file(folder, layer))
        for layer in range(len(layers))
    ]
    outputs = []
    for moe, offloaded in zip(layers, experts, strict=True):
        offloaded.warm(torch.ones(E))  # begins with all the residents that there is room for
        offloaded.reset_counters()
        moe.experts = offloaded
    if linked:
        torchmoe.offload.link(layers)
    begin = time.perf_counter()
    with torch.inference_mode():
        for token in x.unsqueeze(1):  # [1, H] each
            for moe in layers:
                token = token + moe(token).hidden_states
            outputs.append(token)
    return time.perf_counter() - begin, experts, torch.cat(outputs)


def measure(
    layers: Sequence[MoE], x: Tensor, expected: Tensor, folder: Path, percent: int, machine: Machine
) -> Row:
    """One line of the table; ends the program if an output is another one than from memory."""
    store = ExpertStore.open(file(folder, 0), sizes_only())
    # Room for so many experts, and for the pieces of the file that are being read.
    budget = percent * E // 100 * store.expert_bytes + store.window_bytes
    linked_seconds, linked, linked_outputs = run(layers, x, folder, budget, linked=True)
    seconds, experts, outputs = run(layers, x, folder, budget, linked=False)
    if not torch.equal(outputs, expected) or not torch.equal(linked_outputs, expected):
        raise SystemExit(f"offload_demo.py: {percent} %: not the outputs of experts in memory")
    # Nobody predicts for the first layer.
    foreseen = [part.prediction_hit_rate for part in linked[1:]]
    needed = sum(part.hits + part.misses for part in experts)
    hits = sum(part.hits for part in experts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # reading does not hide: the table shows it
        plan = torchmoe.offload.plan_offload(
            sizes_only(),
            num_tokens=1,
            top_k=K,
            budget=budget,
            num_layers=len(layers),
            hit_rate=hits / needed,
            **machine._asdict(),
        )
    return Row(
        percent=percent,
        megabytes=len(layers) * budget / 1e6,
        tokens_per_second=len(x) / seconds,
        hit_rate=hits / needed,
        megabytes_read=sum(part.bytes_read for part in experts) / len(x) / 1e6,
        predicted=1 / plan.step_time,
        foreseen=sum(foreseen) / len(foreseen) if foreseen else math.nan,
        linked_tokens_per_second=len(x) / linked_seconds,
    )


# ---- what is shown

HEAD = (
    f"{'budget':>18} {'tokens/s':>9} {'hit rate':>9} {'read':>14} {'predicted':>11} "
    f"{'foreseen':>9} {'linked':>10}"
)


def line(row: Row) -> str:
    """One line of the table."""
    return (
        f"{row.percent:>5} % {row.megabytes:>7.0f} MB {row.tokens_per_second:>9.1f} "
        f"{row.hit_rate:>9.2f} {row.megabytes_read:>5.1f} MB/token {row.predicted:>7.1f} t/s "
        f"{row.foreseen:>9.2f} {row.linked_tokens_per_second:>6.1f} t/s"
    )


def draw(rows: Sequence[Row], path: Path) -> None:
    """The speed, and where the experts came from, by budget."""
    from matplotlib.figure import Figure  # takes a second that the table does not need
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    percents = [row.percent for row in rows]
    figure = Figure(figsize=(9, 3.2), dpi=150, layout="constrained")
    speed, hits, read = figure.subplots(1, 3)
    measured = {"color": BLUE, "marker": "o", "markersize": 5, "label": "measured"}
    predicted = {"color": "0.45", "marker": "s", "markersize": 4, "linestyle": "--"}
    speed.plot(percents, [row.tokens_per_second for row in rows], **measured)
    speed.plot(percents, [row.predicted for row in rows], label="predicted", **predicted)
    ahead = {"color": ORANGE, "marker": "^", "markersize": 5}
    of_linked = [row.linked_tokens_per_second for row in rows]
    speed.plot(percents, of_linked, label="linked layers", **ahead)
    speed.set_yscale("log")
    speed.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    speed.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    speed.yaxis.set_minor_formatter(NullFormatter())
    speed.legend(frameon=False, fontsize=9)
    hits.plot(percents, [row.hit_rate for row in rows], **(measured | {"label": "in memory"}))
    hits.plot(percents, [row.foreseen for row in rows], label="foreseen, layers linked", **ahead)
    hits.set_ylim(0, 1.05)
    hits.legend(frameon=False, fontsize=9, loc="lower right")
    read.plot(percents, [row.megabytes_read for row in rows], **measured)
    read.set_ylim(bottom=0)
    titles = {
        speed: "tokens per second",
        hits: "share of the experts needed",
        read: "MB read for a token",
    }
    for axes, title in titles.items():
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("budget, % of the experts", fontsize=9)
        axes.set_xticks(percents)
        axes.tick_params(labelsize=8, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(color="0.9")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line, measures, and shows."""
    parser = Parser("offload_demo.py", __doc__, EXAMPLES)
    parser.add_argument("--layers", type=number(int, 1, 64), default=4, help="default 4")
    parser.add_argument("--tokens", type=number(int, 1, 10**6), default=200, help="default 200")
    parser.add_argument("--seed", type=number(int, 0, 2**63), default=0, help="default 0")
    parser.add_argument(
        "--folder", type=Path, help="for the files (default: that for temporary ones)"
    )
    parser.add_argument(
        "--figure", type=Path, nargs="?", const=FIGURE, metavar="PATH",
        help=f"draws the table as PATH.png (default {FIGURE})",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    if given.figure is not None and given.figure.suffix != ".png":
        parser.error(f"--figure: must end in .png, got {given.figure}")
    torch.manual_seed(given.seed)
    try:
        with tempfile.TemporaryDirectory(prefix="offload-demo-", dir=given.folder) as folder:
            rows = compare(given.layers, given.tokens, Path(folder))
        if given.figure is not None:
            draw(rows, given.figure)
            print(f"figure: {given.figure}")
    except OSError as error:
        parser.error(f"cannot write {error.filename}: {error.strerror}")
    return 0


def compare(number_of_layers: int, count: int, folder: Path) -> list[Row]:
    """Measures every budget and prints the table."""
    x = tokens(count)
    layers, expected = write_layers(number_of_layers, x, folder)
    machine = torchmoe.offload.measure_machine(sizes_only(), folder=folder)
    total = sum(file(folder, layer).stat().st_size for layer in range(number_of_layers))
    print(
        f"{number_of_layers} layers of {E} experts, {total / 1e6:.0f} MB; {count} tokens, {K} "
        f"experts each\n"
        f"reading {machine.bandwidth / 1e9:.2f} GB/s, computing {machine.flops / 1e9:.0f} GFLOP/s, "
        f"memory {machine.memory_bandwidth / 1e9:.1f} GB/s\n\n{HEAD}"
    )
    rows = []
    for percent in SHARES:
        rows.append(measure(layers, x, expected, folder, percent, machine))
        print(line(rows[-1]), flush=True)
    print("\nthe outputs are those of experts in memory, bit for bit")
    return rows


if __name__ == "__main__":
    terminal.run(main)
