"""The texts that are classified: where they come from, and that no test text is learned from."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import torch

from classified import DOMAINS, numbered
from studies.classification import texts
from studies.classification.texts import CLS, LONGEST, SHORTEST, Stream, Texts, as_texts
from training.cleaning import Document
from training.corpus import Domain


def of_class(some: Texts, label: int) -> list[bytes]:
    return [
        bytes(some.bytes_of(text).tolist())
        for text in range(len(some))
        if some.labels[text] == label
    ]


def places(pieces: list[bytes], documents: list[Document]) -> list[tuple[str, int, int]]:
    """Where each piece is: a document's name, and from where to where."""
    found = []
    for piece in pieces:
        (where,) = [
            (document.name, at, at + len(piece))
            for document in documents
            if (at := document.text.encode().find(piece)) >= 0
        ]
        found.append(where)
    return found


def test_domain_texts_test_on_held_out_files_without_overlap() -> None:
    task = texts.domain_task(DOMAINS)
    assert task.classes == ("a", "b")
    counts = Counter(task.test.labels.tolist())
    assert counts[0] == counts[1] > 10
    for label, domain in enumerate(DOMAINS):
        taken = sorted(places(of_class(task.test, label), domain.held_out))
        assert {name for name, _, _ in taken} == {document.name for document in domain.held_out}
        for (one, _, end), (other, start, _) in pairwise(taken):
            assert one != other or start >= end
        stream = Stream(task, 0)
        for _ in range(20):
            places(of_class(stream.batch(8), label), domain.train)  # each inside one document


def test_module_texts_train_on_the_head_and_test_on_the_tail() -> None:
    task = texts.module_task(DOMAINS, "a", 2)
    assert task.classes == ("A", "B")  # the longest, held-out files among them
    assert texts.module_task(DOMAINS, "a", 3).classes == ("A", "B", "C")
    stream = Stream(task, 3)
    seen = [stream.batch(32) for _ in range(20)]
    for label, name in enumerate(task.classes):
        (document,) = [one for one in DOMAINS[0].train if one.name == name]
        tested = places(of_class(task.test, label), [document])
        trained = [place for some in seen for place in places(of_class(some, label), [document])]
        end = round(texts.TRAIN_SHARE * len(document.text))
        assert max(last for _, _, last in trained) <= end
        assert min(first for _, first, _ in tested) >= end + LONGEST
        # And they use what they may.
        assert max(last for _, _, last in trained) > 0.9 * end
        assert min(first for _, first, _ in trained) < 0.1 * end


def test_a_paragraph_of_a_head_that_is_also_in_a_tail_is_cut_out() -> None:
    common = " ".join(f"word{number}" for number in range(20))
    one, other = numbered("A", 300), numbered("B", 300)
    repeated = Document("A", f"{common}\n\n{one.text}")
    with_tail = Document("B", f"{other.text}\n\n{common}\n\n{'=' * 20}")
    task = texts.module_task([Domain("a", [repeated, with_tail], [])], "a", 2)
    trained = [bytes(document.tolist()) for documents in task.train for document in documents]
    assert all(b"word7" not in text for text in trained)
    assert all(len(text) > 2000 for text in trained)


def test_data_is_the_same_every_time() -> None:
    first, again = texts.domain_task(DOMAINS), texts.domain_task(DOMAINS)
    assert first.test.sha256() == again.test.sha256()
    assert first.test.sha256() != texts.module_task(DOMAINS, "a", 2).test.sha256()
    streams = Stream(first, 1), Stream(again, 1), Stream(first, 2)
    one, same, other = ([stream.batch(8).sha256() for _ in range(3)] for stream in streams)
    assert one == same
    assert len({*one, *other}) == 6


def test_texts_have_all_lengths_and_their_mask() -> None:
    stream = Stream(texts.domain_task(DOMAINS), 0)
    some = stream.batch(2000)
    lengths = some.token_mask.sum(dim=1) - 1
    assert set(lengths.tolist()) == set(range(SHORTEST, LONGEST + 1))
    assert (some.tokens[:, 0] == CLS).all()
    # Counted positions come first.
    assert (some.token_mask[:, :-1] >= some.token_mask[:, 1:]).all()
    counts = torch.bincount(some.labels)
    assert abs(counts[0].item() - 1000) < 4 * math.sqrt(500)  # standard deviations
    tested = texts.domain_task(DOMAINS).test.token_mask.sum(dim=1) - 1
    assert tested.min() >= SHORTEST
    assert tested.max() <= LONGEST


def test_starts_stay_in_their_document() -> None:
    documents = [torch.zeros(LONGEST + 1), torch.zeros(LONGEST), torch.zeros(LONGEST + 2)]
    starts = texts.starts_in(documents).tolist()
    second, third = LONGEST + 1, 2 * LONGEST + 1
    assert starts == [0, 1, second, third, third + 1, third + 2]


def test_a_part_is_padded_no_further_than_it_needs() -> None:
    pieces = [torch.arange(length, dtype=torch.uint8) for length in (50, 60, 100)]
    some = as_texts(pieces, [0, 1, 0])
    part = some.part(0, 2)
    assert part.tokens.shape == (2, 61)
    assert len(part) == 2
    assert torch.equal(part.bytes_of(1), pieces[1])
    assert torch.equal(some.bytes_of(0), pieces[0])
