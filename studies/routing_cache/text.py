"""The language model of `make train` with a cache in each layer: in evaluation, and in training.

Shapes: L layers, N steps.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

import train_lm
from studies.routing_cache.caching import Tally, compared, entries_of, put_caches, update
from studies.routing_cache.scale import SIMILARITIES, Scale
from torchmoe import RoutingCache
from training.batches import next_batch
from training.corpus import Text
from training.evaluation import bits_by_domain, held_out_windows
from training.figures import Values
from training.language_model import LanguageModel, LMOutput, bits
from training.parallel import ALONE
from training.settings import Settings, SettingsError

# ---- in training


@dataclass(frozen=True)
class Trained:
    """A model and how it came to be, with caches or without."""

    model: LanguageModel
    """Without caches, in evaluation mode."""
    losses: Values
    """[N], bits per byte of training text."""
    hit_rate: Values
    """[N], the mean over the layers; NaN without caches."""
    alive: Values
    """[N], the share of the entries that outlive the step, the mean over the layers."""
    held_out: float
    """Bits per byte at the end, without caches, the mean over the domains."""


def train(settings: Settings, text: Text, scale: Scale, similarity: float | None = None) -> Trained:
    """Trains a model; a similarity gives each of its layers a cache.

    Raises:
        SettingsError: the loss is not finite.
    """
    job = train_lm.new_job(settings)
    caches: list[RoutingCache] = []
    if similarity is not None:
        caches = put_caches(job.model, lambda: RoutingCache(scale.trained_size, similarity))
    rows = []
    for _ in range(scale.steps):
        batch = next_batch(text, job.progress.step, settings, ALONE)
        before = [(len(cache), cache.invalidated) for cache in caches]
        lr = train_lm.learning_rate(job, job.share)
        step = train_lm.optimizer_step(job, job.model, batch, lr, ALONE)
        found = [entries_of(routing) >= 0 for routing in step.output.routings if caches]
        died = [
            (cache.invalidated - invalidated) / size
            for cache, (size, invalidated) in zip(caches, before, strict=True)
            if size
        ]
        rows.append(
            (
                bits(float(step.losses.mean())),
                fmean(float(hits.double().mean()) for hits in found) if found else np.nan,
                1 - fmean(died) if died else np.nan,
            )
        )
    losses, hit_rate, alive = np.array(rows).T
    if not np.isfinite(losses).all():
        raise SettingsError(f"--steps: the loss is no longer finite after {scale.steps} steps")
    model = train_lm.ByteLM(settings.model())
    model.load_state_dict(job.model.state_dict())  # which caches are no part of
    windows = held_out_windows(text.held_out, settings.context, scale.windows)
    held_out = fmean(bits_by_domain(model, windows, scale.batch).values())
    return Trained(model.eval(), losses, hit_rate, alive, held_out)


# ---- in evaluation


@dataclass(frozen=True)
class Followed:
    """Caches of one size and similarity, after they have seen some text."""

    hit_rate: Values
    """[L]."""
    agreement: Values
    """[L], NaN without a hit."""
    complete: Values
    """[L], calls of those measured in which every gate input has found an entry."""
    change: float
    """Loss with the caches minus loss without, bits per byte."""
    nbytes: int
    """Of the caches of all layers together."""
    entries: Values
    """[L], how many there are at the end."""
    compared: Values
    """[L], keys that a lookup compares with a gate input, at the end."""


def batches_of(text: Text, context: int, count: int, rows: int) -> list[Tensor]:
    """Batches [rows, context + 1] of held-out text, in which all domains are mixed."""
    each = -(-count * rows // len(text.held_out))
    windows = torch.cat([*held_out_windows(text.held_out, context, each).values()])
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    return list(torch.split(windows[order[: count * rows]], rows))


def follow_all(
    model: LanguageModel, batches: Sequence[Tensor], scale: Scale
) -> dict[int, dict[float, Followed]]:
    """Every size and every similarity."""
    plain = [loss(model, batch)[0] for batch in batches[scale.warm :]]
    return {
        size: {
            similarity: follow(model, batches, scale.warm, plain, RoutingCache(size, similarity))
            for similarity in SIMILARITIES
        }
        for size in scale.sizes
    }


def follow(
    model: LanguageModel,
    batches: Sequence[Tensor],
    warm: int,
    plain: Sequence[float],
    like: RoutingCache,
) -> Followed:
    """The text read with caches, which remember each batch after it was read.

    Args:
        model: without caches.
        batches: of text.
        warm: so many of them fill the caches first.
        plain: the loss of each other batch without caches.
        like: what each layer's cache is a copy of.
    """
    model = copy.deepcopy(model)
    caches = put_caches(model, lambda: copy.deepcopy(like))
    tally = Tally(caches)
    changes = []
    for place, batch in enumerate(batches):
        value, output = loss(model, batch)
        if place >= warm:
            tally.add(output.routings)
            changes.append(value - plain[place - warm])
        update(caches, output.routings)
    return Followed(
        tally.hit_rate,
        tally.agreement,
        tally.complete,
        fmean(changes),
        sum(cache.nbytes for cache in caches),
        np.array([len(cache) for cache in caches], dtype=np.float64),
        np.array(
            [
                compared(cache, routing.details["gate_input"])
                for cache, routing in zip(caches, output.routings, strict=True)
            ]
        ),
    )


@torch.no_grad()
def loss(model: LanguageModel, batch: Tensor) -> tuple[float, LMOutput]:
    """Bits per byte of windows [B, context + 1], and what the model gave."""
    output: LMOutput = model(batch[:, :-1])
    return bits(float(model.loss_per_row(output.logits, batch[:, 1:]).mean())), output
