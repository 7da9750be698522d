"""The tables that the program prints; all fit into 100 columns, most into 80."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from studies.classification.evaluation import KINDS, Findings, by_class, wilson
from studies.classification.model import EXPERTS, TOP_K
from studies.classification.texts import Task
from studies.classification.training import BATCH, Run
from studies.classification.yardsticks import Yardstick
from studies.common.result import Result, make_table
from training import specialization
from training.routers import is_pooled

LINE = 76  # characters of a text that is shown
SHOWN_TEXTS = 3
MARKED = 8  # positions of each
NAME = 25  # characters of a class's name that are shown
POOLED = "sequence_attention"  # the router that pools by a learned query
LAST = -1  # the block whose routers are looked at
RARE = 0.005  # share of the positions; a rarer kind is not shown


def print_task(task: Task) -> None:
    """What there is to tell apart."""
    sizes = [sum(map(len, documents)) for documents in task.train]
    print(
        f"task: {task.name}, {len(task.classes)} classes\n"
        f"train: {sum(sizes):,d} bytes, {min(sizes):,d} to {max(sizes):,d} a class\n"
        f"test: {len(task.test):,d} texts, {len(task.test) // len(task.classes)} of each class"
    )


def show_results(
    result: Result,
    task: Task,
    yardsticks: Mapping[str, Yardstick],
    runs: Mapping[str, Sequence[Run]],
) -> None:
    """A row for each router and each yardstick."""
    some = next(iter(runs.values()))
    result.say(
        f"\naccuracy: % of {len(task.test):,d} unseen texts, with the 95 % interval for so many "
        "(Wilson)\n"
        f"and the range of the seeds ({len(some)}); bits: cross-entropy of the right class; MaxVio:"
        "\nlargest load / mean load - 1; experts: that serve one text at once; the last two are"
        "\nmeans over the blocks"
    )
    table = make_table(
        "router", "accuracy", "95 %", "seeds", "bits", "MaxVio", "experts", "ms/step"
    )
    for name, of_router in runs.items():
        found = [run.findings for run in of_router]
        accuracies = [one.score.accuracy for one in found]
        table.add_row(
            name,
            *accuracy_cells(fmean(accuracies), len(task.test)),
            f"{100 * min(accuracies):.1f}-{100 * max(accuracies):.1f}" if len(found) > 1 else "",
            f"{fmean(one.score.bits for one in found):.3f}",
            f"{fmean(one.max_violation for one in found):.2f}",
            f"{fmean(one.experts_per_text.mean().item() for one in found):.1f}",
            f"{fmean(run.milliseconds for run in of_router):.0f}",
        )
    table.add_section()
    for name, yardstick in yardsticks.items():
        cells = accuracy_cells(yardstick.accuracy, len(task.test))
        table.add_row(name, *cells, "", f"{yardstick.bits:.3f}")
    result.show(table)
    result.say(
        "The n-grams have read all text that trains; the models have read "
        f"{some[0].bytes_read / 1e6:.1f} MB,\n{BATCH} texts a step drawn from it. Naive Bayes is "
        "too sure where it is wrong: it takes\nbytes as independent, and its bits are high for its "
        "accuracy."
    )


def accuracy_cells(accuracy: float, texts: int) -> tuple[str, str]:
    """In percent, and its interval."""
    low, high = wilson(accuracy, texts)
    return f"{100 * accuracy:.1f}", f"{100 * low:.1f}-{100 * high:.1f}"


# ---- what the routers do


def show_classes(result: Result, task: Task, runs: Mapping[str, Sequence[Run]]) -> None:
    """Which expert serves which class, of the routers that decide for a whole sequence."""
    shown = {name: some[0].findings for name, some in runs.items() if is_pooled(name)}
    if not shown:
        return
    result.say(
        "\nWhich expert serves which class: tenths of a class's texts that have the expert as\n"
        "first choice, - for none, . for less than half a tenth. Last block, first seed."
    )
    width = 2 * EXPERTS
    table = make_table("class", *shown)
    told = [information(found, task) for found in shown.values()]
    maps = [
        by_class(found.favourites, task.test.labels, len(task.classes))[LAST]
        for found in shown.values()
    ]
    for label, name in enumerate(short_names(task)):
        table.add_row(
            name, *(" ".join(map(tenths, own[label].tolist())).ljust(width) for own in maps)
        )
    table.add_section()
    cells = [f"{one.information:.2f} of {one.label_entropy:.2f}" for one in told]
    table.add_row("tells of the class (bits)", *cells)
    result.show(table)
    most = max(one.shuffled_max for one in told)
    result.say(f"With the texts' classes shuffled the experts still tell up to {most:.2f} bits.")


def short_names(task: Task) -> list[str]:
    """The ends of the classes' names, which may be paths."""
    return [name[-NAME:] for name in task.classes]


def tenths(share: float) -> str:
    """One character: 0 to 9 tenths, X for all."""
    if share == 0:
        return "-"
    digit = round(10 * share)
    return "." if digit == 0 else "X" if digit == 10 else str(digit)


def information(found: Findings, task: Task) -> specialization.Specialization:
    """What the first choice of each text, in the last block, tells about its class."""
    first = found.favourites[LAST].argmax(dim=1, keepdim=True)  # [N, 1]
    generator = torch.Generator().manual_seed(0)
    (told,) = specialization.specialize(
        [first], task.test.labels, task.classes, "class", EXPERTS, generator
    )
    return told


def pooled_weights(task: Task, runs: Mapping[str, Sequence[Run]], text: int) -> Tensor:
    """How the learned query weighs a text in the last block, first seed: [1 + bytes], CLS first."""
    pooling = runs[POOLED][0].findings.pooling
    assert pooling is not None
    return pooling[LAST, text, task.test.token_mask[text]]


def print_pooling(task: Task, runs: Mapping[str, Sequence[Run]]) -> None:
    """The bytes of a few texts that decide, by the learned query."""
    if POOLED not in runs:
        return
    print(
        f"\nWhat {POOLED} pools: ^ the {MARKED} bytes with the largest weights. Last "
        "block, first seed."
    )
    for text in shown_texts(task):
        weights = pooled_weights(task, runs, text)
        best = weights[1:].topk(MARKED)
        even = MARKED / len(weights)
        print(
            f"\n{task.classes[task.test.labels[text]]}: they have "
            f"{100 * best.values.sum():.0f} % of the weight (even: {100 * even:.0f} %), "
            f"CLS has {100 * weights[0]:.0f} %"
        )
        marks = "".join("^" if place in best.indices else " " for place in range(len(weights) - 1))
        written = one_line(task.test.bytes_of(text))
        for start in range(0, len(written), LINE):
            print(f"  {written[start : start + LINE]}")
            if line := marks[start : start + LINE].rstrip():
                print(f"  {line}")


def shown_texts(task: Task) -> list[int]:
    """The first test text of a few classes, spread over them."""
    count = min(SHOWN_TEXTS, len(task.classes))
    per_class = len(task.test) // len(task.classes)
    return [place * len(task.classes) // count * per_class for place in range(count)]


def one_line(data: Tensor) -> str:
    """One character for each byte, none of which a terminal takes for a command."""
    return "".join(
        "↵" if byte == ord("\n") else chr(byte) if 32 <= byte < 127 else "·"
        for byte in data.tolist()
    )


def show_picks(result: Result, task: Task, runs: Mapping[str, Sequence[Run]]) -> None:
    """How many experts pick a byte, by what it is."""
    if "expert_choice" not in runs:
        return
    found = runs["expert_choice"][0].findings
    frequency = found.frequency
    result.say(
        f"\nHow many experts pick a byte with expert_choice ({TOP_K} on average). First seed."
    )
    blocks = [f"block {block}" for block in range(len(found.slots_by_kind))]
    table = make_table("kind", "% of all", *blocks)
    for kind, name in enumerate(KINDS):
        if frequency[kind] >= RARE:
            picks = (f"{value:.2f}" for value in found.slots_by_kind[:, kind].tolist())
            table.add_row(name, f"{100 * frequency[kind]:.1f}", *picks)
    result.show(table)
