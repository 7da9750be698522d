"""Trains one router's model with one seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median
from typing import NamedTuple

import torch
from torch.nn import functional

from studies.classification.evaluation import Findings, evaluate
from studies.classification.model import Classifier
from studies.classification.texts import Stream, Task
from training.language_model import bits
from training.settings import SettingsError

BATCH = 32
WARM_UP_STEPS = 20
MAX_GRADIENT_NORM = 1.0
CURVE_POINTS = 50


@dataclass(frozen=True)
class Run:
    """One seed of one router."""

    findings: Findings
    training_bits: list[float]
    """Cross-entropy of the texts that train, each the mean of some steps."""
    milliseconds: float
    """Of a training step, the median."""
    bytes_read: int


class Fitted(NamedTuple):
    """A trained model, and what each step said."""

    model: Classifier
    losses: list[float]
    """Cross-entropy in bits."""
    seconds: list[float]
    bytes_read: int


def rate(step: int, steps: int) -> float:
    """The share of the learning rate at a step, from 1: up, then evenly down to nearly 0."""
    return min(1.0, step / WARM_UP_STEPS) * (1 - (step - 1) / steps)


def train(
    router: str, task: Task, seed: int, steps: int, lr: float, advance: Callable[[], None]
) -> Run:
    """Trains and tests; `advance` is called after every step.

    Raises:
        SettingsError: the loss is not finite.
    """
    fitted = fit(router, task, seed, steps, lr, advance)
    stride = max(1, steps // CURVE_POINTS)
    return Run(
        findings=evaluate(fitted.model, task.test),
        training_bits=[fmean(fitted.losses[at : at + stride]) for at in range(0, steps, stride)],
        milliseconds=1e3 * median(fitted.seconds),
        bytes_read=fitted.bytes_read,
    )


def fit(
    router: str, task: Task, seed: int, steps: int, lr: float, advance: Callable[[], None]
) -> Fitted:
    """Trains; see `train`."""
    torch.manual_seed(seed)
    stream = Stream(task, seed)
    model = Classifier(router, len(task.classes))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses, seconds = [], []
    bytes_read = 0
    for step in range(1, steps + 1):
        start = time.perf_counter()
        texts = stream.batch(BATCH)
        scores = model(texts)
        loss = functional.cross_entropy(scores.logits, texts.labels)
        (loss + scores.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        for group in optimizer.param_groups:
            group["lr"] = lr * rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        model.update(scores.routings)
        losses.append(bits(loss.item()))
        seconds.append(time.perf_counter() - start)
        bytes_read += int(texts.token_mask.sum()) - len(texts)
        if not math.isfinite(losses[-1]):
            raise SettingsError(
                f"--lr must be lower, got {lr:g}: the loss of {router} is no longer finite after "
                f"{step} steps"
            )
        advance()
    return Fitted(model, losses, seconds, bytes_read)
