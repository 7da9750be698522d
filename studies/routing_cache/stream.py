"""One domain after another, and the first once more: what the caches still know.

Shapes: N steps of the stream.
"""

from __future__ import annotations

import copy
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from studies.routing_cache.caching import entries_of, put_caches, update
from studies.routing_cache.scale import USUAL, Scale
from studies.routing_cache.text import loss
from torchmoe import RoutingCache
from torchmoe.ops import EVICTIONS
from training.corpus import Text
from training.evaluation import spread_windows
from training.figures import Values
from training.language_model import LanguageModel

BACK = 0.95  # of the level at a domain's end: what recovers
LEVEL_SHARE = 0.25  # of a domain's steps, at its end, whose mean is the level


class Stream(NamedTuple):
    """Windows of text in the order in which they come."""

    domains: list[str]
    """One after another."""
    steps: list[list[Tensor]]
    """Of each domain, windows [rows, context + 1]."""


class Change(NamedTuple):
    """How the hit rate takes one change of domain."""

    before: float
    """The level at the end of the domain before."""
    first: float
    """In the first step after the change."""
    after: float
    """The level at the end of the new domain."""
    steps: int
    """After so many the hit rate is back at BACK of that level."""


def stream_of(text: Text, context: int, scale: Scale) -> Stream:
    """Held-out text of each domain, and of the first again, none of whose windows comes twice."""
    names = [*text.held_out]
    rows = max(1, scale.batch // 4)
    count = scale.segment * rows
    parts = []
    for name in names:
        windows = spread_windows(text.held_out[name], context, 2 * count)
        parts.append(list(torch.split(windows[::2], rows)))
        if name == names[0]:
            again = list(torch.split(windows[1::2], rows))
    return Stream([*names, names[0]], [*parts, again])


def study(model: LanguageModel, stream: Stream, scale: Scale) -> dict[str, Values]:
    """The hit rate of each step [N], the mean over the layers, by eviction."""
    return {eviction: follow(model, stream, scale, eviction) for eviction in EVICTIONS}


def follow(model: LanguageModel, stream: Stream, scale: Scale, eviction: str) -> Values:
    """See `study`."""
    model = copy.deepcopy(model)
    caches = put_caches(model, lambda: RoutingCache(scale.stream_size, USUAL, eviction=eviction))
    rates = []
    for steps in stream.steps:
        for windows in steps:
            _, output = loss(model, windows)
            rates.append(
                fmean(float((entries_of(one) >= 0).double().mean()) for one in output.routings)
            )
            update(caches, output.routings)
    return np.array(rates)


def changes_of(rates: Values, segment: int) -> list[Change]:
    """Each change of domain in hit rates [N], of `segment` steps in each domain."""
    parts = rates.reshape(-1, segment)
    last = max(1, round(LEVEL_SHARE * segment))
    levels = parts[:, -last:].mean(axis=1)
    return [
        Change(
            float(levels[place - 1]),
            float(part[0]),
            float(levels[place]),
            int((part >= BACK * levels[place]).argmax()),
        )
        for place, part in enumerate(parts)
        if place
    ]
