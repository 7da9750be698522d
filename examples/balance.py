"""A router that starts collapsed, under each way to balance it: which one brings it back?

One layer of 8 experts, two for each token, learns a task in which experts pay: tokens come from 16
clusters, and a token's target is a function common to all clusters plus one of its cluster's own.
At the start every token chooses the same two experts. A method is a few arguments of the layer; all
else, the start and the tokens among it, is the same for all methods at equal seed.

A method recovers if for the last tenth of the run at least MaxVio stays below 1, so that the
busiest expert has less than twice the mean load, and if the task loss over that tenth is below the
control's. MaxVio is largest load / mean load - 1 of a batch as the router wants it, here the mean
of 40 steps; a dead expert is one without a token in a batch; every batch is new, so that the task
loss is one on unseen tokens. Its unit is the share of the clusters' own functions in the target: 1
is a layer that has learned the common function and nothing else.

The coefficients are the papers', none is tuned: 0.01 for load_balancing_loss wherever its fractions
come from (Switch Transformer, arXiv 2101.03961), 0.1 each for importance and load (Shazeer et al.,
arXiv 1701.06538, without the noise of their router), a rate of 0.001 for the selection bias
(DeepSeek-V3, arXiv 2412.19437). For the losses of entropies, whose papers train on other
objectives, it is load_balancing_loss's. The learning rate is that of train_lm.py. Rerouting with a
capacity of an even share is there for contrast: it evens the work from the first step on, whatever
the router wants, and MaxVio shows whether the router follows.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which `python -P` leaves out

import terminal
import torchmoe
from lm import figures, run_folder, trials
from lm.intervals import Values
from lm.run_folder import FolderError
from lm.settings import Parser, Settings, SettingsError, number
from torchmoe.nn import Balance, Capacity, MoE, Router

HIDDEN_SIZE, INTERMEDIATE_SIZE, EXPERTS, TOP_K = 32, 16, 8, 2
SEQUENCES, LENGTH = 16, 32  # of a batch
CLUSTERS, CLUSTERS_PER_SEQUENCE = 16, 4
# Of the target's variance. As in a language model, most of the loss is not at stake where a router
# chooses: its gradient would else be so large that no usual coefficient could be felt beside it.
OWN_SHARE = 0.1
# By how much the logits of the first two experts are above the others. It must be more than any
# token's own preferences (the difference of two logits has a standard deviation of 1.1), and still
# let the other experts' probabilities be felt: 0.1 % each.
COLLAPSE = 6.0
LR = Settings().lr
STEPS_PER_RECORD = 40
BOUND = 1.0  # of MaxVio
END_SHARE = 0.1  # of the steps: where recovery shows and final numbers are taken
CONTROL, HEALTHY = "control", "never_collapsed"
SHOWN_LOSS = 1.3
LOSS_TICKS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3, 5, 10)
BOUND_LOOK: Mapping[str, Any] = {"color": "black", "linewidth": 0.8, "zorder": 3}


@dataclass(frozen=True)
class Method:
    """What is different from one method to the next."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of the layer, whose balance is Balance(0) else."""
    starts_collapsed: bool = True


METHODS = {
    CONTROL: Method(),
    HEALTHY: Method(starts_collapsed=False),
    "load_balancing:batch": Method({"balance": Balance(0.01)}),
    "load_balancing:sequence": Method({"balance": Balance(0.01, fraction_from="sequence")}),
    "load_balancing:history": Method({"balance": Balance(0.01, fraction_from="history")}),
    "importance+load": Method(
        {"balance": Balance(0, losses=[("importance_loss", 0.1), ("load_loss", 0.1)])}
    ),
    "mutual_information": Method(
        {"balance": Balance(0, losses=[("mutual_information_loss", 0.01)])}
    ),
    "global_entropy": Method({"balance": Balance(0, losses=[("global_entropy_loss", 0.01)])}),
    "selection_bias": Method({"balance": Balance(0, selection_bias_rate=0.001)}),
    "next_best": Method({"capacity": Capacity(1, overflow="next_best")}),
}
EXAMPLES = """\
examples:
  balance.py                                          every method, three minutes or so
  balance.py --methods selection_bias --steps 800     one of them, beside the control
  balance.py --lr 1e-2 --out runs/balance-fast        does it depend on the learning rate?
"""


@dataclass(frozen=True)
class Run:
    """One seed of one method; N records, each the mean of some steps."""

    steps: Values
    """[N], optimizer steps at the end of each record."""
    violation: Values
    """[N], MaxVio."""
    dead: Values
    """[N], experts without a token."""
    rerouted: Values
    """[N], share of the slots that went to another expert than the router's choice."""
    loss: Values
    """[N], see above."""

    def at_end(self, values: Values) -> float:
        """The mean over the end of the run."""
        return float(values[self.steps > (1 - END_SHARE) * self.steps[-1]].mean())

    def recovery(self, control: Run) -> int | None:
        """The step after which it had recovered, None if it did not."""
        above = np.flatnonzero(self.violation >= BOUND)
        last_above = self.steps[above[-1]] if len(above) else 0
        if last_above > (1 - END_SHARE) * self.steps[-1]:
            return None
        better = self.at_end(self.loss) < control.at_end(control.loss)
        return int(last_above) if better else None


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line, trains and reports."""
    given = make_parser().parse_args(arguments)
    # More threads are slower at this size.
    torch.set_num_threads(1)
    names = [name for name in METHODS if name in (CONTROL, *given.methods)]
    try:
        with run_folder.locked(given.out):
            runs = trials.train_all(
                names,
                given.seeds,
                given.steps,
                lambda name, seed, advance: train(name, seed, given.steps, given.lr, advance),
                describe,
            )
            report(given.out, runs, given.lr)
    except (SettingsError, FolderError) as error:
        make_parser().error(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="balance.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="NAME",
        help=f"which, beside {CONTROL}: {', '.join(METHODS)} (default all)",
    )
    parser.add_argument(
        "--steps",
        type=number(int, 1, 10**6),
        default=2000,
        metavar="N",
        help="optimizer steps of each run (default 2000)",
    )
    parser.add_argument(
        "--seeds",
        type=number(int, 1, 100),
        default=3,
        metavar="N",
        help="runs of each method (default 3)",
    )
    parser.add_argument(
        "--lr",
        type=number(float, 1e-9, 10.0),
        default=LR,
        metavar="X",
        help=f"learning rate of Adam (default {LR})",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/balance"),
        metavar="FOLDER",
        help="where the figure and the numbers go (default runs/balance)",
    )
    return parser


# ---- the experiment


class Task:
    """Tokens and targets; an endless stream of batches that depends on the seed alone."""

    def __init__(self, seed: int) -> None:
        """Draws where the clusters are and what is to be learned."""
        self.generator = torch.Generator().manual_seed(seed)
        features = HIDDEN_SIZE - 1
        self.centres = self.normal(CLUSTERS, features)
        # Both parts of a target have variance 1, and so has the target.
        self.common = self.normal(features, HIDDEN_SIZE) / math.sqrt(2 * features)
        self.own = self.normal(CLUSTERS, features, HIDDEN_SIZE) / math.sqrt(features)

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers of variance 1."""
        return torch.randn(shape, generator=self.generator)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Tokens and targets, each [B, S, HIDDEN_SIZE]; B sequences of S tokens.

        A sequence is about a few clusters only, as a text is about few things: what is even over
        the batch is not even in each sequence.
        """
        order = torch.rand(SEQUENCES, CLUSTERS, generator=self.generator)
        about = order.topk(CLUSTERS_PER_SEQUENCE, dim=1).indices  # [B, few]
        shape = SEQUENCES, LENGTH
        which = torch.randint(CLUSTERS_PER_SEQUENCE, shape, generator=self.generator)
        cluster = about.gather(1, which)  # [B, S]
        offset = self.normal(*shape, 1, HIDDEN_SIZE - 1)  # from the cluster's centre
        own = (offset @ self.own[cluster]).squeeze(2)  # [B, S, H]
        place = self.centres[cluster] + offset.squeeze(2)  # [B, S, H - 1]
        target = math.sqrt(1 - OWN_SHARE) * place @ self.common + math.sqrt(OWN_SHARE) * own
        # The first feature is constant: the experts' bias, and the handle for the collapse.
        return torch.cat([torch.ones(*shape, 1), place], dim=-1), target


def make_layer(method: Method, seed: int) -> MoE:
    """The layer, in which TOP_K experts are far above the others for every token, or none is."""
    torch.manual_seed(seed)
    moe = MoE(
        HIDDEN_SIZE,
        INTERMEDIATE_SIZE,
        EXPERTS,
        TOP_K,
        # It learns the common function, so that the experts have the clusters' own to learn.
        shared_experts=nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE, bias=False),
        **{"balance": Balance(0), **method.arguments},
    )
    # The weights of the constant feature add the same to the logits of every token. They are the
    # router's own parameter, so that whatever teaches the router can undo it.
    assert isinstance(moe.router, Router)
    with torch.no_grad():
        offset = moe.router.weight[:, 0].zero_()  # [E]
        if method.starts_collapsed:
            offset[:TOP_K] = COLLAPSE
    return moe


def train(name: str, seed: int, steps: int, lr: float, advance: Callable[[], None]) -> Run:
    """Trains one layer and follows it; `advance` is called after every step.

    Raises:
        SettingsError: the loss is not finite.
    """
    task = Task(seed)
    moe = make_layer(METHODS[name], seed)
    optimizer = torch.optim.Adam(moe.parameters(), lr=lr)
    rows, losses = [], []
    with torchmoe.watch(moe) as watcher:
        for step in range(1, steps + 1):
            tokens, target = task.batch()
            output = moe(tokens)
            loss = (output.hidden_states - target).square().mean()
            (loss + output.aux_loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            moe.update(output.routing)
            losses.append(loss.item() / OWN_SHARE)
            advance()
            if step % STEPS_PER_RECORD == 0 or step == steps:
                if not math.isfinite(sum(losses)):
                    raise SettingsError(
                        f"--lr must be lower, got {lr:g}: the loss of {name} is no longer finite "
                        f"after {step} steps"
                    )
                (routing,) = watcher.collect().values()  # means since the last record
                numbers = routing.max_violation, routing.dead_experts, routing.rerouted_share
                rows.append([step, *(value.item() for value in numbers), fmean(losses)])
                losses = []
    return Run(*np.array(rows, dtype=np.float64).T)


def describe(name: str, seed: int, run: Run) -> str:
    """What a run ends with."""
    return (
        f"{name:23s}  seed {seed}  MaxVio {run.at_end(run.violation):.2f}  "
        f"task loss {run.at_end(run.loss):.2f}"
    )


# ---- what is left of it


def report(folder: Path, runs: Mapping[str, Sequence[Run]], lr: float) -> None:
    """Prints the table and what it says, draws the figure, writes the numbers."""
    results = {name: summary(name, runs) for name in runs}
    print_table(results)
    print("\n".join(verdict(results)))
    steps = runs[CONTROL][0].steps.astype(int).tolist()
    content = {
        "about": " ".join((__doc__ or "").split()),
        "unit": "one number, or one curve, per seed in each list",
        "learning_rate": lr,
        "steps": steps[-1],
        "steps_at_records": steps,
        "results": {
            name: {
                "arguments": {key: repr(value) for key, value in METHODS[name].arguments.items()},
                "starts_collapsed": METHODS[name].starts_collapsed,
                **results[name],
                "curves": {
                    "max_violation": [rounded(run.violation) for run in some],
                    "task_loss": [rounded(run.loss) for run in some],
                },
            }
            for name, some in runs.items()
        },
    }
    trials.save(draw(runs), content, folder, "balance")


def summary(name: str, runs: Mapping[str, Sequence[Run]]) -> dict[str, list[Any]]:
    """What the table shows of a method, one entry for each seed."""
    pairs = list(zip(runs[name], runs[CONTROL], strict=True))
    return {
        "recovered_after_steps": [run.recovery(control) for run, control in pairs],
        "max_violation": [run.at_end(run.violation) for run, _ in pairs],
        "dead_experts": [run.at_end(run.dead) for run, _ in pairs],
        "rerouted_share": [run.at_end(run.rerouted) for run, _ in pairs],
        "task_loss": [run.at_end(run.loss) for run, _ in pairs],
    }


def print_table(results: Mapping[str, Mapping[str, list[Any]]]) -> None:
    """A row for each method: means over the seeds and, where they differ, ranges."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)  # fits into 80 columns
    table.add_column("method", no_wrap=True)
    for title in ("steps", "range", "MaxVio", "range", "dead", "loss", "range"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, result in results.items():
        violation, loss = result["max_violation"], result["task_loss"]
        table.add_row(
            name,
            *recovery_cells(name, result["recovered_after_steps"]),
            f"{fmean(violation):.2f}",
            ends(violation, ".2f"),
            f"{fmean(result['dead_experts']):.1f}",
            f"{fmean(loss):.2f}",
            ends(loss, ".2f"),
        )
    seeds = len(results[CONTROL]["task_loss"])
    print(
        f"\nsteps: after so many it has recovered: MaxVio stays below {BOUND:g}, and the loss ends"
        f"\nbelow the {CONTROL}'s; the rest: means of the last tenth of the steps, "
        f"{seeds} seed{'s' * (seeds > 1)}"
    )
    Console(highlight=False).print(table)


def recovery_cells(name: str, steps: Sequence[int | None]) -> tuple[str, str]:
    """Mean and range of the steps where all seeds recovered, else how many did."""
    if not METHODS[name].starts_collapsed:
        return "", ""
    found = [one for one in steps if one is not None]
    if len(found) == len(steps):
        return f"{fmean(found):.0f}", ends(found, "d")
    return (f"{len(found)} of {len(steps)}" if found else "no"), ""


def ends(values: Sequence[float], digits: str) -> str:
    """Least and largest, where there is more than one."""
    return f"{min(values):{digits}}-{max(values):{digits}}" if len(values) > 1 else ""


def verdict(results: Mapping[str, Mapping[str, list[Any]]]) -> list[str]:
    """Which methods recover and which do not, and what those that reroute still move."""
    counts = {
        name: sum(one is not None for one in result["recovered_after_steps"])
        for name, result in results.items()
        if METHODS[name].starts_collapsed
    }
    seeds = len(results[CONTROL]["task_loss"])
    groups = {
        "recovered": [name for name, count in counts.items() if count == seeds],
        "recovered with some seeds": [name for name, n in counts.items() if 0 < n < seeds],
        "not recovered": [name for name, count in counts.items() if count == 0],
    }
    sentences = [f"{title}: {', '.join(names)}" for title, names in groups.items() if names]
    for name, result in results.items():
        if any(result["rerouted_share"]):
            share = fmean(result["rerouted_share"])
            sentences.append(f"{name}: {share:.0%} of the slots are still rerouted at the end")
    return sentences


def rounded(values: Values) -> list[float]:
    """Four digits, enough for a curve."""
    return [float(f"{value:.4g}") for value in values]


def draw(runs: Mapping[str, Sequence[Run]]) -> Figure:
    """MaxVio and task loss by steps."""
    figure = figures.new_figure(figures.WIDTH, 4.8)
    left, right = figure.subplots(1, 2)
    looks = looks_of(list(runs))
    for name, some in runs.items():
        draw_lines(left, some, [run.violation for run in some], looks[name])
        draw_lines(right, some, [run.loss for run in some], looks[name])
    left.axhline(BOUND, **BOUND_LOOK)
    left.set_ylabel("MaxVio")
    right.set_ylabel("task loss")
    right.set_yscale("log")
    for axes in (left, right):
        figures.set_loss_axes(axes)
        axes.set_xlabel("optimizer steps")
    left.set_ylim(bottom=0)
    # The common function, which all learn alike at the start, would flatten the rest.
    lowest = min(run.loss.min() for some in runs.values() for run in some)
    right.set_ylim(0.95 * lowest, max(SHOWN_LOSS, 1.2 * lowest))
    right.yaxis.set_major_locator(FixedLocator(LOSS_TICKS))
    right.yaxis.set_minor_locator(NullLocator())
    right.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))

    seeds = len(runs[CONTROL])
    about = f"line: mean of {seeds} seeds    band: their range"
    handles = [Line2D([], [], label=name, **look) for name, look in looks.items()]
    handles.append(Line2D([], [], label=f"recovered: below {BOUND:g}", **BOUND_LOOK))
    figures.add_legend(figure, handles, about if seeds > 1 else "one seed")
    return figure


def looks_of(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each method's line is drawn: a colour for a family, none for what is there to compare."""
    looks = {
        CONTROL: {"color": "black", "linestyle": "-", "linewidth": 2},
        HEALTHY: {"color": "black", "linestyle": (0, (1, 1)), "linewidth": 1.2},
    }
    families: dict[str, list[str]] = {}
    for name in METHODS:
        if name not in looks:
            families.setdefault(name.partition(":")[0], []).append(name)
    for colour, family in enumerate(families.values()):
        for place, name in enumerate(family):
            dashes = figures.line_look(colour + place)["linestyle"]
            looks[name] = {**figures.line_look(colour), "linestyle": dashes}
    return {name: looks[name] for name in names}


def draw_lines(
    axes: Axes, runs: Sequence[Run], values: Sequence[Values], look: Mapping[str, Any]
) -> None:
    """The mean over the seeds, and a band from the least to the largest."""
    steps, stacked = runs[0].steps, np.array(values)  # [N], [S, N]
    single = "." if len(steps) == 1 else ""  # one point alone makes no line
    axes.plot(steps, stacked.mean(axis=0), marker=single, **look)
    low, high = stacked.min(axis=0), stacked.max(axis=0)
    axes.fill_between(steps, low, high, color=look["color"], alpha=0.12, linewidth=0)


if __name__ == "__main__":
    terminal.run(main)
