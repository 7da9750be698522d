"""Which experts of a trained language model a user's own sentences match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from torchmoe import ops
from train_lm import ByteLM
from training import checkpoint
from training.settings import TORCH_DTYPES
from walkthrough.made_up import probabilities
from walkthrough.printing import print_table

MOST_SHOWN = 46  # columns of a sentence; the rest of a row takes less than 54


class TextError(ValueError):
    """The sentences cannot be matched; the message says why in one line."""


@dataclass(frozen=True)
class Match:
    """The expert that a sentence matches best, in one layer."""

    expert: int
    match: float
    """Mean over the sentence's bytes of the expert's probability."""
    first_choices: float
    """Share of the bytes that choose it first."""


@dataclass(frozen=True)
class Sentence:
    """A sentence that the model has read."""

    text: str
    length: int
    """In bytes."""
    read: int
    """How many of them the model has read."""
    matches: list[Match]
    """One per layer."""


def match_sentences(path: Path, model_path: Path) -> None:
    """Reads the sentences and the model, and prints the table.

    Raises:
        TextError: there are no sentences or no experts.
        CheckpointError: the checkpoint cannot be read.
    """
    sentences = read_sentences(path)
    start, model = load_model(model_path)
    matched = [match(model, sentence) for sentence in sentences]
    config = model.config
    print(
        f"{start.path}, {start.progress.step} steps: {config.layers} layers, "
        f"top {config.top_k} of {config.experts} experts in each\n"
        "match: mean over the sentence's bytes of p = softmax(logits); even would be "
        f"{1 / config.experts:.1%}\nfirst: share of its bytes that choose this expert first"
    )
    print_table(make_table(matched))
    for number, sentence in enumerate(matched, 1):
        if sentence.read < sentence.length:
            print(
                f"sentence {number} has {sentence.length} bytes; the model's context holds "
                f"{config.context}, so the first {sentence.read} count"
            )


def read_sentences(path: Path) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        TextError: the file cannot be read, is not UTF-8 or holds no sentence.
    """
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise TextError(f"--text: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TextError(f"--text: {path} is not UTF-8: {error.reason}") from error
    sentences = [line.strip() for line in content.split("\n") if line.strip()]
    if not sentences:
        raise TextError(f"--text: {path} must have a sentence, got an empty file")
    return sentences


def load_model(path: Path) -> tuple[checkpoint.Checkpoint, ByteLM]:
    """A trained model with experts, and where it comes from.

    Raises:
        TextError: there is none, or it has no experts.
        CheckpointError: the checkpoint cannot be read.
    """
    if not path.exists():
        raise TextError(f"--checkpoint: {path} is not there; make train leaves one in runs/lm")
    start = checkpoint.load(path, "--checkpoint")
    if start.settings.feed_forward != "moe":
        raise TextError(
            f"--checkpoint: {start.path} must hold a model with experts, "
            f"got a {start.settings.feed_forward} one"
        )
    model = ByteLM(start.settings.model()).to(TORCH_DTYPES[start.settings.dtype])
    checkpoint.restore_model(start, model)
    return start, model.eval()


@torch.no_grad()
def match(model: ByteLM, text: str) -> Sentence:
    """Lets the model read one sentence, as much of it as its context holds."""
    content = text.encode()
    read = content[: model.config.context]
    matches = []
    for routing in model(torch.tensor([list(read)])).routings:
        means = ops.mean_over_tokens(probabilities(routing.logits))  # [E]
        best = int(ops.select_experts(means.unsqueeze(0), 1))
        plan = ops.dispatch_plan(routing.selected[:, :1], len(means))
        firsts = plan.expert_offsets.diff()  # [E]
        matches.append(Match(best, means[best].item(), firsts[best].item() / len(read)))
    return Sentence(text, len(content), len(read), matches)


def make_table(sentences: Sequence[Sentence]) -> Table:
    """A row for each sentence and layer, the sentence at its first one."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("sentence", no_wrap=True, overflow="ellipsis", max_width=MOST_SHOWN)
    for title in ("layer", "expert", "match", "first"):
        table.add_column(title, justify="right", no_wrap=True)
    for number, sentence in enumerate(sentences, 1):
        # A control character would move the cursor of whoever looks at it.
        shown = "".join(c if c.isprintable() else " " for c in sentence.text)
        for layer, found in enumerate(sentence.matches):
            table.add_row(
                *((str(number), shown) if layer == 0 else ("", "")),
                str(layer),
                str(found.expert),
                f"{found.match:.1%}",
                f"{found.first_choices:.0%}",
                end_section=layer == len(sentence.matches) - 1,
            )
    return table
