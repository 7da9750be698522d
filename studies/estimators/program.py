"""Compares the router's gradient estimators: does any train the model better than the exact one?

The transformer of train_lm.py is trained with each, several seeds of each, all with the same
settings. At equal seed all start from the same weights and read the same bytes in the same order,
so that differences to exact are taken seed by seed. Their confidence intervals are Student's,
corrected for how many estimators are compared. An estimator comes with the normalisation of the
weights that it is made for; "exact:none" is exact with that of default_vector and sparsemixer,
which tells what is theirs and what the normalisation's.

Runs are trained some at a time, which makes their own times useless. A step's time is measured
afterwards, with all cores and the estimators taking turns; curves by time are steps times that.
Equal time is when the estimator with the fastest steps ends. Slower ones are then before the end of
their schedule, their learning rate still high: that is part of what their steps cost. The intervals
at equal time hold for the step times as measured, whose own error is not in them.

Stopped and started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from studies.common.outcome import checked
from studies.common.study import Study, run
from torchmoe.nn import known_estimators
from torchmoe.ops import NORMALIZES
from training.settings import Settings

EXAMPLES = """\
examples:
  python -m studies.estimators                      every estimator, 40 minutes on two cores
  python -m studies.estimators --estimators straight_through exact:none --seeds 10
  python -m studies.estimators --top-k 1 --out runs/estimators-top1
"""
YARDSTICK = "exact"
CONTROL = "exact:none"


def kind_name(text: str) -> str:
    """An estimator on the command line, as NAME or NAME:NORMALIZE."""
    name, colon, normalize = text.partition(":")
    if name not in known_estimators():
        known = ", ".join(known_estimators())
        raise argparse.ArgumentTypeError(f"must name one of {known}, got {text!r}")
    if colon and normalize not in NORMALIZES:
        known = ", ".join(NORMALIZES)
        raise argparse.ArgumentTypeError(f"must have one of {known} after the colon, got {text!r}")
    return text


def settings_of(kind: str, common: Settings) -> Settings:
    """The settings of a model with that estimator.

    Raises:
        SettingsError: it is not defined for its normalisation.
    """
    name, _, normalize = kind.partition(":")
    return checked(replace(common, estimator=name, normalize=normalize or common.normalize))


STUDY = Study(
    program="python -m studies.estimators",
    about=__doc__ or "",
    examples=EXAMPLES,
    noun="estimator",
    yardstick=YARDSTICK,
    names=(*known_estimators(), CONTROL),
    name_help=f"{', '.join(known_estimators())}; NAME:NORMALIZE is one with other weights "
    f"(default all, and {CONTROL})",
    read_name=kind_name,
    settings_of=settings_of,
    defaults=replace(
        Settings(), steps=1000, checkpoint_every=100, threads=1, out="runs/estimators"
    ),
    settled=("feed_forward", "estimator", "seed", "minutes", "load", "resume"),
)


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line and compares."""
    return run(STUDY, arguments)
