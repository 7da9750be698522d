"""The default text of the main job: no leak, no licences, nothing generated, nothing twice."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train_lm as model
from training import cleaning, corpus
from training.cleaning import Document


@pytest.fixture(scope="module")
def domains() -> list[corpus.Domain]:
    return corpus.load([])


def test_three_domains_of_some_size(domains: list[corpus.Domain]) -> None:
    assert [domain.name for domain in domains] == ["python", "english", "cpp"]
    for domain in domains:
        assert 500_000 < len(corpus.as_bytes(domain.train)) < 1.1 * corpus.DOMAIN_BYTES
        assert len(corpus.as_bytes(domain.held_out)) > 50_000


def test_no_file_is_in_both_splits(domains: list[corpus.Domain]) -> None:
    # Over all domains together: docstrings and code of one file are on one side.
    train = {document.name for domain in domains for document in domain.train}
    held_out = {document.name for domain in domains for document in domain.held_out}
    assert train.isdisjoint(held_out)


def test_no_run_of_thirteen_words_is_in_both_splits(domains: list[corpus.Domain]) -> None:
    train = {run for domain in domains for document in domain.train for run in document.runs}
    held_out = {run for domain in domains for document in domain.held_out for run in document.runs}
    assert len(train) > 100_000
    assert train.isdisjoint(held_out)


def test_held_out_lines_are_new(domains: list[corpus.Domain]) -> None:
    """Another definition than the cleaning's own: whole lines of at least 40 characters.

    Across domains a line in common is a leak; within one, a few idioms are natural.
    """

    def long_lines(documents: list[Document]) -> list[str]:
        lines = (line.strip() for document in documents for line in document.text.split("\n"))
        return [line for line in lines if len(line) >= 40]

    for held_out in domains:
        lines = long_lines(held_out.held_out)
        for train in domains:
            known = set(long_lines(train.train))
            share = sum(line in known for line in lines) / len(lines)
            assert share < (0.04 if train is held_out else 0.001), (train.name, held_out.name)


def test_no_licences_and_nothing_generated(domains: list[corpus.Domain]) -> None:
    licence = re.compile(
        r"copyright|licen[cs]e|all rights reserved|redistribution and use|without warranty"
        r"|permission (?:is hereby|to use)|as is\"",
        re.IGNORECASE,
    )
    for domain in domains:
        for document in [*domain.train, *domain.held_out]:
            assert not licence.search(document.text), document.name
            assert not re.search(r"ATen/ops/|\.pb\.h$|/generated/|^test/", document.name)
            assert "TORCH_STABLE_ONLY" not in document.text.split("\n", 1)[0]


def test_english_is_not_in_the_python_domain(domains: list[corpus.Domain]) -> None:
    python, english, _ = domains
    for document in python.train[:20]:
        assert not re.search(r'^ *(?:def|class) .*:\n +r?"""', document.text, re.MULTILINE)
    assert {document.name for document in python.train} & {d.name for d in english.train}


def test_text_does_not_depend_on_the_process(domains: list[corpus.Domain]) -> None:
    code = "from training import corpus; print(corpus.Text.load([]).sha256())"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(corpus.__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == corpus.Text.of(domains).sha256()


def test_hash_of_the_text_tells_every_change(tmp_path: Path) -> None:
    def hash_of(**files: str) -> str:
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        return corpus.Text.load([str(tmp_path / name) for name in files]).sha256()

    hashes = [
        hash_of(a="x" * 1000, b="y" * 1000),
        hash_of(b="y" * 1000, a="x" * 1000),
        hash_of(a="x" * 1001, b="y" * 1000),
        hash_of(a="x" * 999 + "z", b="y" * 1000),
        hash_of(a="z" + "x" * 999, b="y" * 1000),
        hash_of(a="x" * 1000, c="y" * 1000),
    ]
    assert len(set(hashes)) == len(hashes)
    assert hash_of(a="x" * 1000, b="y" * 1000) == hashes[0]


# ---- cleaning


def test_strips_licences_from_comments_only() -> None:
    source = (
        "/* Copyright 2020 Somebody.\n * All rights reserved. */\n#pragma once\n\n"
        "// Adds.\nint add(int a, int b);\n\n// Licensed under the MIT licence,\n// see LICENSE.\n"
        "int sub(int a, int b);\n"
    )
    cleaned = cleaning.tidy(cleaning.strip_licences(source, cleaning.CPP_COMMENTS))
    assert cleaned == (
        "#pragma once\n\n// Adds.\nint add(int a, int b);\n\nint sub(int a, int b);\n"
    )
    python = "# Copyright me\n# 2020\nimport os\n# why\nx = 1\n"
    cleaned = cleaning.strip_licences(python, cleaning.PYTHON_COMMENTS)
    assert cleaned == "import os\n# why\nx = 1\n"


def test_splits_docstrings_from_code() -> None:
    source = (
        '"""About the module."""\n\n'
        'class A:\n    """About A.\n\n    >>> A()\n\n    More.\n    """\n'
        '    def f(self):\n        """Only this."""\n\n    def g(self): "inline"; return 1\n'
    )
    code, prose = corpus.split_docstrings(source)
    assert code == (
        '\nclass A:\n    def f(self):\n        pass\n\n    def g(self): "inline"; return 1\n'
    )
    assert prose == "About the module.\n\nAbout A.\n\nMore.\n\nOnly this."
    compile(code, "code", "exec")


def test_near_duplicates_and_overlap() -> None:
    draw = random.Random(0)
    words = [f"w{n}" for n in range(500)]

    def text(paragraph_count: int) -> str:
        lines = [" ".join(draw.sample(words, 40)) for _ in range(paragraph_count)]
        return "\n\n".join(lines) + "\n"

    first, second = text(10), text(10)
    near = first.replace("w7 ", "w8 ")
    documents = [Document(name, t) for name, t in (("a", first), ("b", near), ("c", second))]
    kept = list(cleaning.without_near_duplicates(documents))
    assert [document.name for document in kept] == ["a", "c"]

    quote = cleaning.paragraphs(first)[3]
    train = Document("train", f"{second}\n{quote}\n")
    (clean,) = cleaning.without_overlap([train], [Document("held", first)])
    assert quote not in clean.text
    assert clean.text.strip() == second.strip()


def test_text_that_repeats_itself_is_not_worth_reading() -> None:
    overloads = (f"Tensor op_{n}(const Tensor& self, int64_t dim);\n" for n in range(100))
    assert not cleaning.is_worth_reading("".join(overloads))
    assert not cleaning.is_worth_reading("int x = 1;\n")
    assert cleaning.is_worth_reading(Path(model.__file__).read_text(encoding="utf-8"))
    assert cleaning.is_generated("// @generated by torchgen\nint x;\n")
    assert not cleaning.is_generated("// Written by a person\nint x;\n")
