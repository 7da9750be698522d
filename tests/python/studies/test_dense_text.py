"""The second text of the comparison with dense models."""

from __future__ import annotations

from pathlib import Path

import pytest

from studies.dense import prose
from training import corpus
from training.cleaning import Document
from training.corpus import CorpusError, Text


def test_the_held_out_tenth_of_the_prose_is_what_the_program_holds_out(tmp_path: Path) -> None:
    words = [f"word{number:04d}" for number in range(4000)]
    documents = [
        Document(f"{start}", " ".join(words[start : start + 100])) for start in range(0, 4000, 100)
    ]
    # One shares a run of words with one that is held out.
    copied = Document("copied", f"{documents[0].text}\n\n{' '.join(reversed(words[:300]))}")
    path = tmp_path / prose.FILE
    path.write_text(prose.with_held_out_tenth([*documents[:20], copied, *documents[20:]]))
    (domain,) = corpus.load([str(path)])
    (train,), (held_out,) = domain.train, domain.held_out
    assert held_out.text.startswith("word0000 word0001 ")
    assert "word0299 word0298 " in train.text
    assert train.runs.isdisjoint(held_out.runs)
    assert len(train.text) == 9 * len(held_out.text) > 30_000


def test_the_prose_is_of_packages_and_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prose, "PACKAGES", ("networkx", "nowhere_at_all"))
    path = prose.write(tmp_path)
    text = path.read_text()
    assert len(text) > 100_000
    assert "graph" in text
    assert "import networkx" not in text.partition("\n")[0]
    path.write_text("another")
    assert prose.write(tmp_path).read_text() == "another"
    monkeypatch.setattr(prose, "PACKAGES", ("nowhere_at_all",))
    path.unlink()
    with pytest.raises(CorpusError, match="too little text: use --second-data"):
        prose.write(tmp_path)
    assert not path.exists()


def test_the_second_text_can_be_read(data: list[str], tmp_path: Path) -> None:
    path = prose.write(tmp_path)
    text = Text.load([str(path)])
    (train,), (held_out,) = text.train.values(), text.held_out.values()
    assert len(train) > 2_000_000
    assert len(held_out) == pytest.approx(len(train) / 9, rel=0.02)
