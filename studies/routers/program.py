"""Compares the routers that a causal language model can use, and experts that talk.

The transformer of train_lm.py is trained with each router, several seeds of each, with the same
settings: at equal seed all read the same bytes in the same order. NAME+communication is a router
whose layer lets the experts of a byte exchange information before their outputs are added up.
Confidence intervals are Student's over the seeds' differences to the linear router, corrected for
how many are compared.

A step's time is measured after the runs, with all cores and the routers taking turns; curves by
time are steps times that. Equal time is when the router with the fastest steps ends. The intervals
at equal time hold for the step times as measured, whose own error is not in them.

Stopped and started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from studies.common.outcome import checked
from studies.common.study import Study, run
from training.routers import ROUTERS, looks_ahead
from training.settings import Settings

EXAMPLES = """\
examples:
  python -m studies.routers                         every causal router, half an hour
  python -m studies.routers --routers cosine hash --seeds 10
  python -m studies.routers --routers linear+communication --top-k 4 --out runs/talk
"""
YARDSTICK = "linear"
SUFFIX = "+communication"
CAUSAL = tuple(name for name in ROUTERS if looks_ahead(name) is None)


def kind_name(text: str) -> str:
    """A router on the command line, as NAME or NAME+communication."""
    if text.removesuffix(SUFFIX) not in ROUTERS:
        known = ", ".join(CAUSAL)
        raise argparse.ArgumentTypeError(f"must name one of {known}, got {text!r}")
    return text


def settings_of(kind: str, common: Settings) -> Settings:
    """The settings of a model with that router.

    Raises:
        SettingsError: it looks ahead.
    """
    return checked(
        replace(common, router=kind.removesuffix(SUFFIX), communication=kind.endswith(SUFFIX))
    )


STUDY = Study(
    program="python -m studies.routers",
    about=__doc__ or "",
    examples=EXAMPLES,
    noun="router",
    yardstick=YARDSTICK,
    names=(*CAUSAL, f"{YARDSTICK}{SUFFIX}"),
    name_help=f"{', '.join(CAUSAL)}; NAME{SUFFIX} lets its experts talk "
    f"(default all, and {YARDSTICK}{SUFFIX})",
    read_name=kind_name,
    settings_of=settings_of,
    defaults=replace(Settings(), steps=1000, checkpoint_every=100, threads=1, out="runs/routers"),
    settled=("feed_forward", "router", "communication", "seed", "minutes", "load", "resume"),
)


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line and compares."""
    return run(STUDY, arguments)
