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
from functools import partial

import torch

from studies.balance.experiment import CONTROL, LR, METHODS, describe, train
from studies.balance.report import report
from studies.common import trials
from studies.common.program import NOTHING, exit_status
from training import run_folder
from training.arguments import Parser
from training.run_folder import FolderError
from training.settings import SettingsError

EXAMPLES = """\
examples:
  python -m studies.balance                         every method, three minutes or so
  python -m studies.balance --methods selection_bias --steps 800
  python -m studies.balance --lr 1e-2 --out runs/balance-fast
"""


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line, trains and reports."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    return exit_status(parser, partial(compare, given), (SettingsError, FolderError), NOTHING)


def compare(given: argparse.Namespace) -> None:
    """Trains and reports."""
    torch.set_num_threads(1)  # more are slower at this size
    names = [name for name in METHODS if name in (CONTROL, *given.methods)]
    with run_folder.locked(given.out):
        runs = trials.train_all(
            names,
            given.seeds,
            given.steps,
            lambda name, seed, advance: train(name, seed, given.steps, given.lr, advance),
            describe,
        )
        report(given.out, __doc__ or "", runs, given.lr)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser("python -m studies.balance", __doc__, EXAMPLES)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="NAME",
        help=f"which, besides {CONTROL}: {', '.join(METHODS)} (default all)",
    )
    trials.add_options(parser, steps=2000, seeds=3, lr=LR, out="runs/balance")
    return parser
