"""What a run learned: bits per byte next to n-grams, what the experts took, a sample, figures."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from torchmoe import Watcher
from training import metrics, ngrams, run_folder
from training.checkpoint import Progress
from training.corpus import Text
from training.evaluation import Evaluation, evaluate, generate, held_out_windows, readable
from training.language_model import LanguageModel
from training.run_folder import FolderError, RunFolder
from training.settings import Settings
from training.specialization import BYTE_CLASSES, Specialization, byte_classes, specialize

HELD_OUT_WINDOWS = 256  # per domain, evenly spread over its held-out text
NGRAM_ORDERS = (3, 4, 5)
PROMPT_BYTES = 64
SAMPLE_BYTES = 240


@dataclass(frozen=True)
class HeldOut:
    """The model, and its yardsticks, on held-out text."""

    model: dict[str, Evaluation]
    ngrams: dict[int, dict[str, float]]  # bits per byte by order and domain

    @property
    def bits(self) -> dict[str, float]:
        """The model's bits per byte by domain."""
        return {name: evaluation.bits for name, evaluation in self.model.items()}


def report(
    model: LanguageModel,
    text: Text,
    settings: Settings,
    progress: Progress,
    folder: RunFolder | None,
    watcher: Watcher | None,
) -> None:
    """Prints all of it; where there is a folder, draws the figures and writes the results there.

    Args:
        model: the trained one.
        text: what it read, and what it did not.
        settings: of the run.
        progress: of the run.
        folder: of the run, None where nothing was trained.
        watcher: saw the steps of this process, None where there were none or no experts.
    """
    if watcher is not None:
        print("\nrouting since training began or was resumed")
        watcher.summary()
    held_out = measure(model, text, settings)
    print_table(held_out, settings)
    kinds = what_experts_took(held_out, text, settings)
    print_specialization(kinds)
    print_samples(model, text, settings)
    if folder is None:
        return
    total, active = model.count_parameters()
    print_time(progress)
    for path in draw(folder, held_out, kinds, watcher):
        print(f"figure: {path}")
    results = {
        "steps": progress.step,
        "bytes": progress.bytes,
        "seconds": progress.seconds,
        "training_seconds": progress.training_seconds,
        "parameters": total,
        "active_parameters": active,
        "bits_per_byte": with_mean(held_out.bits),
        "ngram_bits_per_byte": {n: with_mean(bits) for n, bits in held_out.ngrams.items()},
        "specialization": [one.to_dict() for kind in kinds for one in kind],
    }
    run_folder.write_json(folder.results, results)


def measure(model: LanguageModel, text: Text, settings: Settings) -> HeldOut:
    """The model and n-gram models on the same bytes, each with the window's bytes to look at."""
    windows = held_out_windows(text.held_out, settings.context, HELD_OUT_WINDOWS)
    fitted = ngrams.fit(list(text.train.values()), max(NGRAM_ORDERS))
    return HeldOut(
        {name: evaluate(model, some, settings.rows) for name, some in windows.items()},
        {
            order: {name: float(fitted.bits(w, order).mean()) for name, w in windows.items()}
            for order in NGRAM_ORDERS
        },
    )


def with_mean(bits: dict[str, float]) -> dict[str, float]:
    """The domains and their mean."""
    return {**bits, "mean": statistics.fmean(bits.values())}


def print_table(held_out: HeldOut, settings: Settings) -> None:
    """Bits per byte by domain."""
    print(f"\nheld-out bits per byte ({HELD_OUT_WINDOWS} windows of {settings.context} bytes each)")
    columns = {"this model": with_mean(held_out.bits)}
    columns |= {f"{n}-gram": with_mean(held_out.ngrams[n]) for n in reversed(NGRAM_ORDERS)}
    table = Table("domain", box=box.SIMPLE_HEAD, pad_edge=False)
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    rows = list(columns["this model"])
    for name in rows:
        if name == rows[-1]:
            table.add_section()
        table.add_row(name, *(f"{column[name]:.4f}" for column in columns.values()))
    Console(highlight=False).print(table)


def what_experts_took(
    held_out: HeldOut, text: Text, settings: Settings
) -> list[list[Specialization]]:
    """By layer: what the experts took of the byte classes, and of the domains; none if dense."""
    if settings.feed_forward == "dense":
        return []
    names = list(held_out.model)
    labels_of_text = {name: byte_classes(text.held_out[name]) for name in names}
    classes = held_out_windows(labels_of_text, settings.context, HELD_OUT_WINDOWS)
    class_of_byte = torch.cat([c[:, :-1].flatten() for c in classes.values()])  # [M]
    bytes_per_domain = HELD_OUT_WINDOWS * settings.context
    domain_of_byte = torch.arange(len(names)).repeat_interleave(bytes_per_domain)  # [M]
    layers = [
        torch.cat([held_out.model[name].indices[layer] for name in names])  # [M, K]
        for layer in range(settings.layers)
    ]
    generator = torch.Generator().manual_seed(settings.seed)
    return [
        specialize(layers, labels, label_names, kind, settings.experts, generator)
        for labels, label_names, kind in (
            (class_of_byte, BYTE_CLASSES, "byte class"),
            (domain_of_byte, names, "domain"),
        )
    ]


def print_specialization(kinds: list[list[Specialization]]) -> None:
    """Whether the experts specialized, and in what, a line per layer and kind of label."""
    for kind in kinds:
        print(f"\nwhat a byte's expert tells about its {kind[0].kind}")
        for one in kind:
            print(f"  layer {one.layer}: {one.in_words()}")


def print_samples(model: LanguageModel, text: Text, settings: Settings) -> None:
    """Text that the model goes on with, in each domain."""
    generator = torch.Generator().manual_seed(settings.seed)
    prompt_bytes = min(PROMPT_BYTES, settings.context)
    prompts = torch.stack([data[:prompt_bytes] for data in text.held_out.values()]).long()  # [D, S]
    samples = generate(model, prompts, SAMPLE_BYTES, generator)  # [D, S + SAMPLE_BYTES]
    for name, sample in zip(text.held_out, samples, strict=True):
        print(f"\nsample, {name} (held-out text up to the bar)")
        whole = f"{readable(sample[:prompt_bytes])}|{readable(sample[prompt_bytes:])}"
        print("".join(f"  {line}\n" for line in whole.split("\n")), end="")


def print_time(progress: Progress) -> None:
    """Where the time went."""
    training = progress.training_seconds
    print(
        f"\n{training:.0f} s in optimizer steps; besides that display and metrics took "
        f"{progress.reporting_seconds / training:.2%}, checkpoints and held-out tests "
        f"{progress.saving_seconds / training:.2%}"
    )


def draw(
    folder: RunFolder,
    held_out: HeldOut,
    kinds: list[list[Specialization]],
    watcher: Watcher | None,
) -> list[Path]:
    """Draws and saves the figures.

    The load of the experts is drawn twice: that of the whole run from its records, and step by step
    as far as the watcher saw it.
    """
    # The import takes time, and only this needs it.
    from training import figures

    records = [asdict(record) for record in metrics.read(folder)]
    bits = {order: statistics.fmean(by.values()) for order, by in held_out.ngrams.items()}
    drawn = {"loss": figures.loss_curves(records, bits, held_out.bits)}
    if kinds:
        drawn["expert_load"] = figures.expert_load(records)
        drawn["specialization"] = figures.specialization(*kinds)
    try:
        paths = [
            path for name, one in drawn.items() for path in figures.save(one, folder.figures, name)
        ]
        if watcher is not None:
            for kind in ("png", "svg"):
                paths.append(folder.figures / f"expert_load_by_step.{kind}")
                watcher.plot(paths[-1])
    except OSError as error:
        raise FolderError(
            f"--out: cannot write to {folder.figures}: {error.strerror}; the run is saved, and "
            "--resume reports again"
        ) from error
    return paths
