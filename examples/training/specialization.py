"""What each expert took: how much its choice of bytes tells about their class or their domain.

Shapes: M bytes, K experts per byte, E experts, L labels. A routed slot is one byte at one expert.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Names first, then space, then signs. An ASCII byte in none of these strings is punctuation.
CLASS_MEMBERS = {
    "lowercase": string.ascii_lowercase,
    "uppercase": string.ascii_uppercase,
    "digit": string.digits,
    "underscore": "_",
    "space": " \t\v\f",
    "newline, indent": "\n\r",
    "bracket": "()[]{}",
    "quote": "'\"`",
    "operator": "+-*/%=<>!&|^~@",
    "punctuation": "",
    "non-ASCII": "",
}
BYTE_CLASSES = tuple(CLASS_MEMBERS)
SHUFFLES = 20
# An expert that tells less than this share of what there is to tell about the label is not worth a
# picture. It also covers what shuffling single bytes cannot: neighbours are routed alike and share
# their label, so that a few hundred windows leave some information by coincidence.
FLAT_SHARE = 0.01


def byte_classes(text: Tensor) -> Tensor:
    """The place in BYTE_CLASSES of each byte, uint8 [N] to int64 [N].

    Spaces and tabs before the first other byte of a line are its indent, so the text is one that
    starts with a line; windows are to be cut from the classes, not classified one by one.
    """
    classes = class_of_each_value()[text.long()]
    newline = BYTE_CLASSES.index("newline, indent")
    blank = (text == ord(" ")) | (text == ord("\t"))
    breaks = classes == newline
    place = torch.arange(len(text))
    last_break = torch.where(breaks, place, -1).cummax(0).values
    last_content = torch.where(blank | breaks, -1, place).cummax(0).values
    return torch.where(blank & (last_break >= last_content), newline, classes)


def class_of_each_value() -> Tensor:
    """The class of each of the 256 bytes where it is no indent, int64 [256]."""
    classes = torch.full((256,), BYTE_CLASSES.index("punctuation"))
    classes[128:] = BYTE_CLASSES.index("non-ASCII")
    for index, members in enumerate(CLASS_MEMBERS.values()):
        classes[list(members.encode())] = index
    return classes


def count_table(experts: Tensor, labels: Tensor, num_experts: int, num_labels: int) -> Tensor:
    """How many bytes of each label each expert took.

    Args:
        experts: ids, int64 [M, K]; -1 where a slot was not routed.
        labels: int64 [M].
        num_experts: E.
        num_labels: L.

    Returns:
        Counts of routed slots, int64 [E, L].
    """
    cells = (experts * num_labels + labels[:, None])[experts >= 0]
    counts = torch.bincount(cells, minlength=num_experts * num_labels)
    return counts.view(num_experts, num_labels)


def lift(table: Tensor) -> Tensor:
    """How much more often a label is among an expert's bytes than among all, [E, L] to float64.

    1 is no preference, 2 twice as often, 0 never. NaN where the expert took no byte or the label
    has none.
    """
    share = table / table.sum(dim=1, keepdim=True, dtype=torch.float64)  # among the expert's bytes
    return share / (table.sum(dim=0) / table.sum(dtype=torch.float64))


def entropy(counts: Tensor) -> float:
    """Bits in one draw from the counts, [L]; 0 where nothing was counted."""
    shares = counts[counts > 0] / counts.sum(dtype=torch.float64)
    return max(0.0, -float((shares * shares.log2()).sum()))


def mutual_information(table: Tensor) -> float:
    """Bits that the expert of a routed slot tells about the label of its byte, from [E, L].

    The mean over the routed slots of log2 of the lift; 0 where there is no slot.
    """
    taken = table > 0
    shares = table[taken] / table.sum(dtype=torch.float64)
    return max(0.0, float((shares * lift(table)[taken].log2()).sum()))  # rounding may leave -1e-17


def shuffled_information(
    experts: Tensor,
    labels: Tensor,
    num_experts: int,
    num_labels: int,
    repeats: int,
    generator: torch.Generator,
) -> Tensor:
    """The mutual information that is left by chance: with the labels permuted over the bytes.

    Args:
        experts: ids, int64 [M, K]; -1 where a slot was not routed.
        labels: int64 [M].
        num_experts: E.
        num_labels: L.
        repeats: how many permutations.
        generator: draws them.

    Returns:
        Bits, float64 [repeats].
    """
    values = []
    for _ in range(repeats):
        permuted = labels[torch.randperm(len(labels), generator=generator)]
        table = count_table(experts, permuted, num_experts, num_labels)
        values.append(mutual_information(table))
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Specialization:
    """What the experts of one layer have to do with one kind of label."""

    layer: int  # from 0
    kind: str  # of label, such as "byte class"
    names: tuple[str, ...]  # of the L labels
    lift: Tensor  # float64 [E, L]
    shares: Tensor  # of the routed slots, float64 [E]; all 0 where none was routed
    information: float  # bits that the expert tells about the label
    shuffled_mean: float  # the same with the labels shuffled, over SHUFFLES permutations
    shuffled_max: float
    label_entropy: float  # bits that there are to tell

    @property
    def is_flat(self) -> bool:
        """Whether the experts took their bytes without regard to the label, or nearly so.

        That is when shuffled labels reached the same information at least once, or when what is
        left above their mean is less than FLAT_SHARE of the labels' entropy.
        """
        above_chance = self.information - self.shuffled_mean
        by_chance = self.information <= self.shuffled_max
        return by_chance or above_chance < FLAT_SHARE * self.label_entropy

    def in_words(self) -> str:
        """The finding in one line."""
        if self.is_flat:
            return f"flat: {self.information:.4f} bits; shuffled {self.shuffled_max:.4f}"
        return (
            f"tells {self.information:.2f} of {self.label_entropy:.2f} bits; "
            f"shuffled {self.shuffled_max:.4f}"
        )

    def to_dict(self) -> dict[str, object]:
        """Everything as JSON can hold it: a number that is none becomes None."""
        return {
            "layer": self.layer,
            "kind": self.kind,
            "names": list(self.names),
            "lift": [
                [None if math.isnan(value) else value for value in row]
                for row in self.lift.tolist()
            ],
            "shares": self.shares.tolist(),
            "information": self.information,
            "shuffled_mean": self.shuffled_mean,
            "shuffled_max": self.shuffled_max,
            "label_entropy": self.label_entropy,
            "is_flat": self.is_flat,
        }


def specialize(
    indices: list[Tensor],
    labels: Tensor,
    names: Sequence[str],
    kind: str,
    num_experts: int,
    generator: torch.Generator,
) -> list[Specialization]:
    """Compares each layer's choice of experts with the bytes' labels.

    Args:
        indices: one per layer, the experts of each byte, int64 [M, K]; -1 where not routed.
        labels: int64 [M], each the place of a name.
        names: of the L labels.
        kind: what the labels are, such as "byte class" or "domain".
        num_experts: E.
        generator: shuffles the labels.
    """
    results = []
    for layer, experts in enumerate(indices):
        table = count_table(experts, labels, num_experts, len(names))
        by_chance = shuffled_information(
            experts, labels, num_experts, len(names), SHUFFLES, generator
        )
        results.append(
            Specialization(
                layer=layer,
                kind=kind,
                names=tuple(names),
                lift=lift(table),
                shares=table.sum(dim=1) / table.sum(dtype=torch.float64).clamp(min=1),
                information=mutual_information(table),
                shuffled_mean=float(by_chance.mean()),
                shuffled_max=float(by_chance.max()),
                label_entropy=entropy(table.sum(dim=0)),
            )
        )
    return results
