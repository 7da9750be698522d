"""What each expert took: hand examples, and the two ends, no preference and a perfect split."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from torch import Tensor

from training import specialization
from training.specialization import BYTE_CLASSES, byte_classes


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def class_names(text: bytes) -> list[str]:
    classes = byte_classes(torch.tensor(list(text), dtype=torch.uint8))
    return [BYTE_CLASSES[index] for index in classes.tolist()]


def specialize(
    experts: Tensor, labels: Tensor, num_experts: int, num_labels: int
) -> specialization.Specialization:
    names = [f"label {index}" for index in range(num_labels)]
    (result,) = specialization.specialize(
        [experts], labels, names, "test", num_experts, generator()
    )
    return result


# ---- classes


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (b"azlm", "lowercase"),
        (b"AZ", "uppercase"),
        (b"0189", "digit"),
        (b"_", "underscore"),
        (b"\n\r", "newline, indent"),
        (b"([{}])", "bracket"),
        (b"'\"`", "quote"),
        (b"+-*/%=<>!&|^~@", "operator"),
        (b".,:;?#$\\\0\x1b\x7f", "punctuation"),
        (bytes(range(128, 256)), "non-ASCII"),
    ],
)
def test_class_of_each_byte(text: bytes, name: str) -> None:
    assert class_names(text) == [name] * len(text)


def test_every_byte_has_a_class_and_every_class_a_byte() -> None:
    # After an x, so that the blanks are no indent.
    text = torch.tensor([byte for value in range(256) for byte in (ord("x"), value)])
    classes = byte_classes(text.to(torch.uint8))[1::2]
    assert classes.dtype == torch.int64
    assert classes.unique().tolist() == list(range(len(BYTE_CLASSES)))
    ascii_only = {BYTE_CLASSES[index] for index in classes[:128].tolist()}
    assert ascii_only == {*BYTE_CLASSES} - {"non-ASCII"}


def test_indent_belongs_to_the_newline() -> None:
    signs = {
        "lowercase": "a",
        "space": "s",
        "newline, indent": "n",
        "operator": "o",
        "digit": "0",
        "bracket": "b",
        "punctuation": "p",
    }
    text = b"  if a:\n\t  b = (1)  \n\n  \r\n c\td\x0b\n"
    classes = "nnaasap" + "nnnn" + "asosb0bss" + "n" + "n" + "nnnn" + "nasas" + "n"
    assert "".join(signs[name] for name in class_names(text)) == classes


def test_no_bytes() -> None:
    assert byte_classes(torch.empty(0, dtype=torch.uint8)).shape == (0,)


# ---- the table and what follows from it


def test_counts_by_hand() -> None:
    experts = torch.tensor([[0, 1], [0, -1], [2, 0], [-1, -1]])
    labels = torch.tensor([1, 1, 0, 0])
    table = specialization.count_table(experts, labels, 4, 3)
    assert table.tolist() == [[1, 2, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert table.dtype == torch.int64


def test_lift_by_hand() -> None:
    # 5 slots, 2 of label 0 and 3 of label 1. Expert 0 has 1 and 2 of them.
    table = torch.tensor([[1, 2, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]])
    nan = math.nan
    expected = torch.tensor(
        [
            [(1 / 3) / (2 / 5), (2 / 3) / (3 / 5), nan],
            [0.0, 5 / 3, nan],
            [5 / 2, 0.0, nan],
            [nan, nan, nan],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(specialization.lift(table), expected, equal_nan=True)


def test_information_by_hand() -> None:
    table = torch.tensor([[3, 1], [1, 3]])
    expected = 3 / 4 * math.log2(3 / 2) + 1 / 4 * math.log2(1 / 2)
    assert specialization.mutual_information(table) == pytest.approx(expected)
    assert specialization.entropy(table.sum(dim=0)) == 1


def test_an_outer_product_holds_no_information() -> None:
    table = torch.tensor([1, 2, 7])[:, None] * torch.tensor([5, 1, 3, 11])
    assert specialization.mutual_information(table) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(specialization.lift(table), torch.ones(3, 4, dtype=torch.float64))


def test_perfect_split() -> None:
    labels = torch.arange(4000) % 8
    result = specialize(labels[:, None], labels, 8, 8)
    assert result.information == pytest.approx(3)
    assert result.label_entropy == pytest.approx(3)
    torch.testing.assert_close(result.lift, 8 * torch.eye(8, dtype=torch.float64))
    assert result.shares.tolist() == [1 / 8] * 8
    assert 0 < result.shuffled_mean <= result.shuffled_max < 0.05
    assert not result.is_flat


def test_independent_experts_are_flat() -> None:
    experts = torch.randint(8, (5000, 2))
    labels = torch.randint(11, (5000,))
    result = specialize(experts, labels, 8, 11)
    # What chance leaves: (E-1)(L-1) / (2 ln 2 slots) bits.
    assert result.information == pytest.approx(70 / (2 * math.log(2) * 10_000), rel=0.5)
    assert result.shuffled_mean == pytest.approx(result.information, rel=0.5)
    assert result.is_flat


def test_flat_where_the_information_is_certain_but_small() -> None:
    # The label decides on one byte in a hundred: above chance, and yet not worth a picture.
    labels = torch.arange(100_000) % 2
    experts = torch.arange(100_000) // 2 % 2
    experts[::200] = 0
    experts[1::200] = 1
    result = specialize(experts[:, None], labels, 2, 2)
    assert result.shuffled_max < result.information < 0.01
    assert result.is_flat


def test_slots_that_were_not_routed_do_not_count() -> None:
    labels = torch.arange(600) % 3
    routed = specialize(labels[:, None], labels, 4, 3)
    dropped = torch.full((600, 1), -1)
    padded = specialize(torch.cat((dropped, labels[:, None], dropped), dim=1), labels, 4, 3)
    for name, value in routed.to_dict().items():
        assert padded.to_dict()[name] == value, name


def test_no_slot_at_all_and_a_single_label() -> None:
    labels = torch.zeros(10, dtype=torch.int64)
    for experts in (torch.full((10, 2), -1), torch.empty((0, 2), dtype=torch.int64)):
        result = specialize(experts, labels[: len(experts)], 3, 2)
        assert result.information == result.shuffled_max == result.label_entropy == 0
        assert result.lift.isnan().all()
        assert result.shares.tolist() == [0, 0, 0]
        assert result.is_flat
    assert specialize(torch.randint(3, (10, 1)), labels, 3, 1).is_flat


def test_shuffles_follow_the_generator() -> None:
    experts, labels = torch.randint(4, (300, 2)), torch.randint(5, (300,))
    first, second = (
        specialization.shuffled_information(experts, labels, 4, 5, 7, generator()) for _ in "ab"
    )
    assert first.shape == (7,)
    assert first.dtype == torch.float64
    assert first.unique().numel() == 7
    assert torch.equal(first, second)


def test_one_result_per_layer() -> None:
    labels = torch.arange(60) % 3
    indices = [torch.randint(2, (60, 1)), labels[:, None] % 2]
    results = specialization.specialize(indices, labels, "abc", "letter", 2, generator())
    assert [(r.layer, r.kind, r.names) for r in results] == [
        (0, "letter", ("a", "b", "c")),
        (1, "letter", ("a", "b", "c")),
    ]
    assert results[0].is_flat
    assert not results[1].is_flat


def test_in_words() -> None:
    labels = torch.arange(4000) % 8
    split = specialize(labels[:, None], labels, 8, 8)
    assert re.fullmatch(r"tells 3\.00 of 3\.00 bits; shuffled 0\.0\d+", split.in_words())
    flat = specialize(torch.zeros_like(labels)[:, None], labels, 8, 8)
    assert flat.in_words() == "flat: 0.0000 bits; shuffled 0.0000"


def test_to_dict_is_json() -> None:
    result = specialize(torch.tensor([[0], [1]]), torch.tensor([0, 1]), 3, 2)
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert values["lift"] == [[2, 0], [0, 2], [None, None]]
    assert values["shares"] == [0.5, 0.5, 0]
    assert values["names"] == ["label 0", "label 1"]
    assert values["is_flat"] is True  # two bytes prove nothing
