"""Which experts serve a whole text? Routers that see all of it, on a task that allows them to.

A causal language model refuses a router that looks at a whole sequence. A classifier may use it:
it has the whole text when it starts. Pieces of 48 to 128 bytes of the language model's text are to
be told apart by a small encoder, two blocks of bidirectional attention and of 8 experts, the same
but for the router:

    linear, cosine, hash    each byte chooses two experts, the last one by a hash of its value
    expert_choice           each expert picks bytes of each text, as many as are two for each byte
    sequence_first          CLS, in front of each text, chooses two experts for all of its bytes
    sequence_mean           the mean of CLS and the bytes does
    sequence_attention      a mean of them does, weighted by a learned query
    sequence_given          the same, weighted by how much CLS looks at each in the block's own
                            attention

CLS is the same in every text until attention has learned to bring it something, so that at first
sequence_first sends all texts to the same two experts; it needs one or two hundred steps to come
away from there.

--task domain asks which domain a text is from; the files it is tested on are none of those it has
learned from. --task module asks which of the longest documents of one domain: the first 85 % train
and the end tests.

Accuracies are of texts like the test texts, which come from a few dozen files: the intervals take
the texts as independent and do not know how other files would differ. No setting is tuned for one
router: of the learning rates 0.003 and 0.01 the default is the one that leaves the linear router
with the lower training loss. That says nothing of which router is best with more steps.
"""

# Read in this order: classification/texts.py (the data), model.py, training.py, evaluation.py and
# yardsticks.py (the numbers), display.py and figure.py (what is shown).

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from studies.classification import display, figure
from studies.classification.evaluation import KINDS, by_class, wilson
from studies.classification.model import ROUTERS
from studies.classification.texts import Task, domain_task, module_task
from studies.classification.training import Run, train
from studies.classification.yardsticks import Yardstick, majority, naive_bayes
from studies.common import trials
from studies.common.program import NOTHING, exit_status
from studies.common.result import Result
from training import corpus, run_folder
from training.arguments import Parser, number
from training.corpus import CorpusError
from training.run_folder import FolderError
from training.settings import SettingsError

STEPS, SEEDS, MODULES, DOMAIN = 500, 2, 16, "python"
LR = 1e-2
TASKS = ("domain", "module")
EXAMPLES = """\
examples:
  python -m studies.classification                  every router, about five minutes
  python -m studies.classification --task module    16 modules of Python's library
  python -m studies.classification --task module --domain cpp --modules 8
  python -m studies.classification --routers linear sequence_attention --steps 1000
"""


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line, trains and reports."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every terminal can show a mark for line ends
    parser = make_parser()
    given = parser.parse_args(arguments)
    errors = (SettingsError, CorpusError, FolderError)
    return exit_status(parser, partial(compare, given), errors, NOTHING)


def compare(given: argparse.Namespace) -> None:
    """Trains and reports."""
    torch.set_num_threads(1)  # more are slower at this size
    with run_folder.locked(given.out):
        task = make_task(given)
        display.print_task(task)
        yardsticks = {"majority class": majority(task), **naive_bayes(task)}
        names = [name for name in ROUTERS if name in given.routers]
        runs = trials.train_all(
            names,
            given.seeds,
            given.steps,
            lambda name, seed, advance: train(name, task, seed, given.steps, given.lr, advance),
            describe,
        )
        report(given.out, task, yardsticks, runs, given)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser("python -m studies.classification", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--task", choices=TASKS, default=TASKS[0], help="what to tell apart (default domain)")
    add(
        "--routers",
        nargs="+",
        choices=ROUTERS,
        default=list(ROUTERS),
        metavar="NAME",
        help=f"which: {', '.join(ROUTERS)} (default all)",
    )
    trials.add_options(parser, steps=STEPS, seeds=SEEDS, lr=LR, out="runs/classification")
    add(
        "--domain",
        default=DOMAIN,
        metavar="NAME",
        help=f"whose documents --task module tells apart (default {DOMAIN})",
    )
    add(
        "--modules",
        type=number(int, 2, 256),
        default=MODULES,
        metavar="N",
        help=f"how many of them, the longest (default {MODULES})",
    )
    add(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files or folders of your own text, one domain per path (default that of train_lm.py)",
    )
    return parser


def make_task(given: argparse.Namespace) -> Task:
    """Reads the text."""
    domains = corpus.load(given.data)
    if given.task == "domain":
        return domain_task(domains)
    return module_task(domains, given.domain, given.modules)


def describe(name: str, seed: int, run: Run) -> str:
    """What a run ends with."""
    score = run.findings.score
    return f"{name:18s}  seed {seed}  accuracy {100 * score.accuracy:4.1f} %  {score.bits:.3f} bits"


def report(
    folder: Path,
    task: Task,
    yardsticks: Mapping[str, Yardstick],
    runs: Mapping[str, Sequence[Run]],
    given: argparse.Namespace,
) -> None:
    """Prints the tables, draws the figure, writes the numbers."""
    result = Result(width=100)
    display.show_results(result, task, yardsticks, runs)
    display.show_classes(result, task, runs)
    display.print_pooling(task, runs)
    display.show_picks(result, task, runs)
    content = {
        "about": " ".join((__doc__ or "").split()),
        "unit": "one entry per seed in each list of a router",
        "task": task.name,
        "classes": task.classes,
        "test_texts": len(task.test),
        "test_texts_sha256": task.test.sha256(),
        "steps": given.steps,
        "learning_rate": given.lr,
        "kinds": KINDS,
        "yardsticks": {
            name: {**one._asdict(), "interval": wilson(one.accuracy, len(task.test))}
            for name, one in yardsticks.items()
        },
        "results": {name: summary(some, task) for name, some in runs.items()},
    }
    result.save(
        figure.draw(task, yardsticks, runs), content, folder, f"classification-{given.task}"
    )


def summary(runs: Sequence[Run], task: Task) -> dict[str, list[Any]]:
    """One router's numbers, one entry for each seed."""
    found = [run.findings for run in runs]
    classes = len(task.classes)
    return {
        "accuracy": [one.score.accuracy for one in found],
        "interval": [wilson(one.score.accuracy, len(task.test)) for one in found],
        "bits": [one.score.bits for one in found],
        "max_violation": [one.max_violation for one in found],
        "slots_of_each_expert_by_block": [one.load.tolist() for one in found],
        "experts_per_text_by_block": [one.experts_per_text.tolist() for one in found],
        "slot_shares_by_block_and_class": [
            by_class(one.shares, task.test.labels, classes).tolist() for one in found
        ],
        "first_choices_by_block_and_class": [
            by_class(one.favourites, task.test.labels, classes).tolist() for one in found
        ],
        "experts_per_position_by_block_and_kind": [
            [[rounded(value) for value in block] for block in one.slots_by_kind.tolist()]
            for one in found
        ],
        "training_bits": [run.training_bits for run in runs],
        "milliseconds_per_step": [run.milliseconds for run in runs],
        "bytes_read": [run.bytes_read for run in runs],
    }


def rounded(value: float) -> float | None:
    """As JSON can hold it: none where there is no number."""
    return value if value == value else None
