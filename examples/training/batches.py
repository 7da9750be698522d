"""The windows of text that each optimizer step reads, and the seeds that it draws with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from training.corpus import Text, hash_of
from training.parallel import Processes
from training.settings import Settings


class Batch(NamedTuple):
    """This process's windows of a step, at random places, the domains in turn."""

    inputs: Tensor
    """[B, context] int64."""
    targets: Tensor
    """[B, context] int64, the byte after each input."""
    domains: Tensor
    """[B] int64, the number of each window's domain."""


def next_batch(text: Text, step: int, settings: Settings, group: Processes) -> Batch:
    """The batch of a step, on the device where this process computes."""
    generator = torch.Generator().manual_seed(step_seed("data", settings.seed, step))
    texts = list(text.train.values())
    domains = (step * settings.rows + torch.arange(settings.rows)) % len(texts)  # [rows]
    windows = []
    for domain in domains.tolist():
        data = texts[domain]
        start = int(torch.randint(len(data) - settings.context, (), generator=generator))
        windows.append(data[start : start + settings.context + 1])
    mine = group.share(settings.rows)
    device = group.device(settings.device)
    batch = torch.stack(windows[mine]).long().to(device)  # [B, context + 1]
    return Batch(batch[:, :-1], batch[:, 1:], domains[mine].to(device))


def step_seed(purpose: str, *numbers: int) -> int:
    """A seed for one step. Since nothing is drawn from before, there is no random state to save."""
    text = " ".join([purpose, *map(str, numbers)])
    return hash_of(text) >> 1
