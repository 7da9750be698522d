"""When do the experts of earlier gate inputs serve later ones, and when does that save time?

A RoutingCache gives a gate input the experts of an earlier one that is similar to it. Four parts:

    queries   texts that come again, exactly or with a share of their bytes drawn anew, through an
              encoder that routes whole texts (mean and attention pooling): what is found, how often
              the router would have chosen the same, and what it does to the loss
    text      the language model of train_lm.py on held-out text, a cache in each layer, in several
              sizes; and the same while it trains
    stream    one domain of text after another, and the first again, with both ways of eviction
    time      the lookup against the router that it leaves out, and the whole layer in evaluation
              with reuse="weights" where every lookup hits against the same layer without a cache,
              for linear routers, MLPs ever wider, pooled sequences, and the gate inputs of text

All similarities are tried in the first part and in evaluation. Numbers are means over seeds, with
Student's 95 % interval of each by itself. Times are the fastest of interleaved rounds, on all
cores; they are of one seed.

--small does everything with little of everything, in seconds: it shows that the program works, and
its numbers mean nothing.
"""

# Read in this order: caching.py, queries.py, text.py, stream.py and timing.py (one part each),
# report.py and figure.py (what is shown).

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from studies.classification.texts import domain_task
from studies.common.program import NOTHING, add_seeds, exit_status
from studies.routing_cache import queries, stream, text, timing
from studies.routing_cache.report import Everything, report
from studies.routing_cache.scale import FULL, SMALL, Scale
from training import run_folder
from training.arguments import Parser, number
from training.corpus import CorpusError, Text
from training.run_folder import FolderError, cores
from training.settings import Settings, SettingsError

SEEDS = 3
EXAMPLES = """\
examples:
  python -m studies.routing_cache                   a quarter of an hour on two cores
  python -m studies.routing_cache --small           seconds, to see that it works
  python -m studies.routing_cache --steps 1000 --seeds 5 --out runs/cache-longer
"""


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line, measures and reports."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    errors = (SettingsError, CorpusError, FolderError)
    return exit_status(parser, partial(study, given), errors, NOTHING)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser("python -m studies.routing_cache", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--small", action="store_true", help="little of everything, in seconds")
    add_seeds(parser, SEEDS, "models of each kind")
    add(
        "--steps",
        type=number(int, 1, 10**6),
        metavar="N",
        help=f"optimizer steps of each model (default {FULL.steps}, with --small {SMALL.steps})",
    )
    add(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files or folders of your own text, one domain per path (default that of train_lm.py)",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/routing_cache"),
        metavar="FOLDER",
        help="where the figure and the numbers go (default runs/routing_cache)",
    )
    return parser


def study(given: argparse.Namespace) -> None:
    """Measures and reports."""
    scale = SMALL if given.small else FULL
    if given.steps is not None:
        scale = replace(scale, steps=given.steps)
    with run_folder.locked(given.out):
        corpus = Text.load(given.data)
        if len(corpus.domains) < 2:
            raise SettingsError(f"--data must name at least two paths, got {len(given.data)}")
        settings = Settings(steps=scale.steps)
        corpus.describe(settings.context)
        report(given.out, __doc__ or "", measured(corpus, settings, scale, given.seeds))


def measured(corpus: Text, settings: Settings, scale: Scale, seeds: int) -> Everything:
    """All parts, one after another."""
    found = Everything(scale, list(corpus.train))
    task = domain_task(corpus.domains)
    torch.set_num_threads(1)  # more are slower at this size
    for router in queries.ROUTERS:
        for seed in range(seeds):
            with timed_as(found, "queries", f"{router}, seed {seed}"):
                found.queries.setdefault(router, []).append(
                    queries.study(router, task, seed, scale)
                )
    torch.set_num_threads(cores())
    batches = text.batches_of(corpus, settings.context, scale.warm + scale.measured, scale.batch)
    windows = stream.stream_of(corpus, settings.context, scale)
    found.order = windows.domains
    for seed in range(seeds):
        own = replace(settings, seed=seed)
        with timed_as(found, "training", f"seed {seed}"):
            plain = text.train(own, corpus, scale)
            found.plain.append(plain)
            for similarity in scale.trained_similarities:
                trained = text.train(own, corpus, scale, similarity)
                found.trained.setdefault(similarity, []).append(trained)
        with timed_as(found, "text", f"seed {seed}"):
            found.text.append(text.follow_all(plain.model, batches, scale))
        with timed_as(found, "stream", f"seed {seed}"):
            found.stream.append(stream.study(plain.model, windows, scale))
    with timed_as(found, "time", "all layers"):
        found.cases = timing.study(scale, found.plain[0].model, batches[-1])
    return found


@contextmanager
def timed_as(found: Everything, part: str, what: str) -> Iterator[None]:
    """Adds the seconds of the block to the part's, and says that it is over."""
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    found.seconds[part] = found.seconds.get(part, 0.0) + seconds
    print(f"  {part:8s}  {what:26s}  {seconds:5.1f} s", flush=True)
