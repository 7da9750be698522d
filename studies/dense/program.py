"""Compares the mixture-of-experts language model with a dense one of equal active parameters.

Both are the transformer of train_lm.py and read the same bytes in the same order. The learning rate
is tuned alike for both, on the training loss, so that the held-out text has no part in it. Then
several seeds of each give the loss at equal bytes; and since a dense step is cheaper, the dense
model is trained once more for as many steps as fit into the other's time, which gives the loss at
equal time. Stopped and started again, it goes on where it was.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from studies.common.figures import comparison
from studies.common.outcome import Outcome, common_settings, step_seconds, trained
from studies.common.program import RESUMABLE, add_seeds, exit_status
from studies.common.result import Result
from training import corpus
from training.program import USER_ERRORS, set_threads
from training.settings import FEED_FORWARDS, Settings, make_parser, read_arguments

DEFAULTS = replace(Settings(), steps=1600, out="runs/dense")
# What the comparison chooses itself.
SETTLED = ("feed_forward", "lr", "seed", "minutes", "load", "resume")
EXAMPLES = """\
examples:
  python -m studies.dense                           half an hour on two cores
  python -m studies.dense --experts 16 --top-k 1    another mixture and its dense equal
"""
FIRST_RATES = (1.5e-3, 3e-3, 6e-3)
RATE_FACTOR = 2.0  # to the next learning rate where the best one is at an end of those tried
MOST_RATES = 6


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line and compares."""
    parser = make_parser("python -m studies.dense", __doc__ or "", EXAMPLES, DEFAULTS)
    add_seeds(parser, 3)
    given = read_arguments(parser, arguments)
    return exit_status(parser, partial(compare, given.pop("seeds"), given), USER_ERRORS, RESUMABLE)


def compare(seeds: int, given: dict[str, Any]) -> None:
    """Tunes, trains, times, and reports."""
    common = common_settings(DEFAULTS, given, SETTLED)
    steps = common.steps or 0
    set_threads(common)
    folder = Path(common.out)
    text = corpus.Text.load(list(common.data))
    text.describe(common.context)

    def run(kind: str, seed: int, steps: int, lr: float) -> Outcome:
        name = f"{kind}-lr{lr:g}-seed{seed}-steps{steps}"
        print(f"  {name:34s}", end="", flush=True)
        outcome = trained(
            replace(
                common, feed_forward=kind, lr=lr, seed=seed, steps=steps, out=str(folder / name)
            ),
            text,
        )
        print(
            f"  training {outcome.tuning_loss:.4f}  held-out {outcome.held_out:.4f}  "
            f"{outcome.seconds:5.0f} s",
            flush=True,
        )
        return outcome

    print("\nlearning rate: the training loss of the last tenth decides (bits per byte)")
    rates = {kind: best_rate(partial(run, kind, 0, steps)) for kind in FEED_FORWARDS}
    print("\nequal bytes")
    moe, dense = (
        [run(kind, seed, steps, rates[kind]) for seed in range(seeds)] for kind in FEED_FORWARDS
    )
    print("\nequal time")
    ratio = time_ratio(common, text)
    print(f"  side by side, a step with experts takes {ratio:.2f} times the time of a dense one")
    longer = [run("dense", seed, round(steps * ratio), rates["dense"]) for seed in range(seeds)]
    report(folder, ratio, {"MoE": moe, "dense": dense, "dense, equal time": longer})


def best_rate(run: Callable[[float], Outcome]) -> float:
    """The learning rate with the least training loss, tried further where it is at an end."""
    losses = {rate: run(rate).tuning_loss for rate in FIRST_RATES}
    while len(losses) < MOST_RATES:
        best = min(losses, key=lambda rate: losses[rate])
        if best == min(losses):
            rate = best / RATE_FACTOR
        elif best == max(losses):
            rate = best * RATE_FACTOR
        else:
            break
        losses[rate] = run(rate).tuning_loss
    return min(losses, key=lambda rate: losses[rate])


def time_ratio(common: Settings, text: corpus.Text) -> float:
    """Time of a step with experts over that of a dense one; the two take turns."""
    kinds = {kind: replace(common, feed_forward=kind) for kind in FEED_FORWARDS}
    seconds = step_seconds(kinds, text)
    return seconds["moe"] / seconds["dense"]


def report(folder: Path, ratio: float, outcomes: dict[str, list[Outcome]]) -> None:
    """Prints the table, draws the figure, writes the numbers."""
    results, columns = {}, {}
    moe = [one.held_out for one in outcomes["MoE"]]
    for title, runs in outcomes.items():
        first, losses = runs[0], [one.held_out for one in runs]
        gains = [loss - mine for loss, mine in zip(losses, moe, strict=True)]
        columns[title] = [
            f"{first.active_parameters:,}",
            f"{first.parameters:,}",
            f"{first.settings.lr:g}",
            f"{first.records[-1].bytes:,}",
            f"{statistics.fmean(one.seconds for one in runs):.0f}",
            f"{statistics.fmean(losses):.4f}",
            f"{min(losses):.4f} to {max(losses):.4f}",
            *("", ""),
        ]
        if runs is not outcomes["MoE"]:
            ends = f"{min(gains):+.4f} to {max(gains):+.4f}"
            columns[title][-2:] = f"{statistics.fmean(gains):+.4f}", ends
        results[title] = {
            "active_parameters": first.active_parameters,
            "parameters": first.parameters,
            "settings": first.settings.to_dict(),
            "bytes": first.records[-1].bytes,
            "training_seconds": [one.seconds for one in runs],
            "held_out_bits_per_byte": losses,
            "gain_of_moe": gains,
        }
    result = Result()
    result.say(
        "\nheld-out: bits per byte, the mean of all domains and of "
        f"{len(moe)} seed{'s' * (len(moe) > 1)}\n"
        "MoE less: how far the MoE is below, seed by seed"
    )
    result.show(table(columns))
    curves = {
        title: [
            [{**asdict(record), "seconds": record.training_seconds} for record in one.records]
            for one in runs
        ]
        for title, runs in outcomes.items()
    }
    content = {"step_time_ratio": ratio, "results": results}
    result.say(f"step time ratio: {ratio:.2f}")
    result.save(comparison(curves), content, folder, "dense")


def table(columns: dict[str, list[str]]) -> Table:
    """The outcomes side by side."""
    names = (
        "active parameters",
        "all parameters",
        "learning rate",
        "bytes read",
        "seconds",
        "held-out",
        "  range",
        "MoE less",
        "  range",
    )
    rows = Table("", box=box.SIMPLE_HEAD, pad_edge=False)
    for title in columns:
        rows.add_column(title, justify="right", no_wrap=True)
    for row in zip(names, *columns.values(), strict=True):
        rows.add_row(*row)
    return rows
