"""How well a model does on text that it has not seen, and what it writes itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from training.language_model import LanguageModel, bits

TEMPERATURE = 0.7


class Evaluation(NamedTuple):
    """A model on some windows of text."""

    bits: float
    """Bits per byte."""
    indices: list[Tensor]
    """[W * context, K] per layer: the experts that each byte visited; none of a dense model."""


def spread_windows(data: Tensor, context: int, count: int) -> Tensor:
    """Evenly spread windows [count, context + 1] of a text or of labels of its bytes, int64."""
    starts = torch.linspace(0, len(data) - context - 1, count, dtype=torch.float64).long()
    return data[starts[:, None] + torch.arange(context + 1)].long()


def held_out_windows(texts: dict[str, Tensor], context: int, count: int) -> dict[str, Tensor]:
    """Evenly spread windows of each domain's held-out text."""
    return {name: spread_windows(data, context, count) for name, data in texts.items()}


def bits_by_domain(model: LanguageModel, windows: dict[str, Tensor], rows: int) -> dict[str, float]:
    """Bits per byte of each domain's windows."""
    return {name: evaluate(model, some, rows).bits for name, some in windows.items()}


@torch.no_grad()
def evaluate(model: LanguageModel, windows: Tensor, rows: int) -> Evaluation:
    """Predicts all but the first byte of each window [W, context + 1], `rows` windows at a time."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    indices: list[list[Tensor]] = [[] for _ in model.moes]
    for batch in torch.split(windows, rows):
        output = model(batch[:, :-1].to(device))
        total += float(model.loss_per_row(output.logits, batch[:, 1:].to(device)).sum())
        for layer, routing in zip(indices, output.routings, strict=True):
            layer.append(routing.indices.cpu())
    model.train(was_training)
    return Evaluation(bits(total / len(windows)), [torch.cat(layer) for layer in indices])


@torch.no_grad()
def generate(
    model: LanguageModel, prompt: Tensor, length: int, generator: torch.Generator
) -> Tensor:
    """Continues each row of `prompt` [B, S] by `length` drawn bytes: [B, S + length]."""
    model.eval()
    device = next(model.parameters()).device
    text = prompt
    for _ in range(length):
        window = text[:, -model.config.context :].to(device)
        logits = model(window).logits[:, -1].cpu()  # [B, VOCABULARY]
        probabilities = (logits / TEMPERATURE).softmax(dim=-1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)  # [B, 1]
        text = torch.cat((text, drawn), dim=1)
    return text


def readable(data: Tensor) -> str:
    """The bytes as text that no terminal takes for a command."""
    text = bytes(data.tolist()).decode(errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
