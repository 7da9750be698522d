"""What CONTRIBUTING.md says of files, commands and tests is so.

tests/python/test_additions.py compares its lists of files with the patches of tests/additions.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import fields

import pytest
import torch

import torchmoe
from documents import ROOT, blocks, code_spans
from op_case import OpCase
from torchmoe import losses, ops, presets
from torchmoe.nn.estimators import registry

PAGE = ROOT / "CONTRIBUTING.md"
TEXT = PAGE.read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


#: What stands in backquotes, and the lines of code.
CODE = [
    " ".join(part.split())
    for part in (*code_spans(PAGE), *(line for b in blocks(PAGE) for line in b.text.splitlines()))
    if part.strip()
]


def commands(program: str) -> list[list[str]]:
    """The arguments of each call of a program, or of a module of Python, that the text shows."""
    lines = [part.partition("#")[0] for part in CODE]
    split = [shlex.split(line) for line in lines if re.search(rf"^{program} |-m {program} ", line)]
    return [words[words.index(program) + 1 :] for words in split]


def section(heading: str) -> str:
    found = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    assert found, heading
    return found


def test_the_variables_of_make_exist() -> None:
    given = {word.partition("=")[0] for words in commands("make") for word in words if "=" in word}
    assert given == {"TORCH", "CUDA_PYTHON"}
    for name in given:
        assert f"$({name})" in MAKEFILE


def test_the_paths_exist() -> None:
    """X is whatever is added: something of the kind is there already."""
    named = [part for part in CODE if re.fullmatch(r"[\w.]+(/[\w.]+)+/?|\w+/", part)]
    assert len(named) > 40
    for path in named:
        # What make writes is there only where it was run, on a GPU for one.
        if path.startswith("build/") or path == "docs/measured_cuda.md":
            continue
        places = [ROOT, ROOT / "csrc", ROOT / "python" / "torchmoe"]
        pattern = path.rstrip("/").replace("X", "*")
        assert any(list(place.glob(pattern)) for place in places), path


def test_the_files_without_a_folder_exist() -> None:
    named = [part for part in CODE if re.fullmatch(r"\w+\.(?:py|h|cpp|md|cu)", part)]
    assert named
    for name in named:
        folders = (ROOT / folder for folder in ("csrc", "tests", "python", "docs"))
        assert (ROOT / name).is_file() or any(list(f.rglob(name)) for f in folders), name


def test_the_markers_exist_and_are_used() -> None:
    options = (ROOT / "pyproject.toml").read_text()
    known = set(re.findall(r'^  "(\w+): ', options, flags=re.M))
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "python").rglob("*.py"))
    for name in ("whole_report", "needs_build", "release", "cuda"):
        assert f"`{name}`" in TEXT
        assert name in known
        assert f"pytest.mark.{name}" in tests
    assert re.search(r'^addopts = .*"-m", "not cuda', options, flags=re.M)


def test_the_examples_of_one_test_select_some() -> None:
    """`-k WORD` is part of the name of a test in the file, and so is a name of Catch2's."""
    shown = [words for words in commands("pytest") if "-k" in words]
    assert shown
    for words in shown:
        file = next(word for word in words if word.endswith(".py"))
        word = words[words.index("-k") + 1]
        assert re.search(rf"def test_\w*{word}", (ROOT / file).read_text()), words
    (pattern,) = re.findall(r'torchmoe_tests "(\w+)\*"', TEXT)
    cases = (ROOT / "tests" / "cpp" / "ops" / "gate_weights_test.cpp").read_text()
    assert f'TEST_CASE("{pattern}' in cases


def test_ci_runs_what_it_says() -> None:
    assert "make lint test          # what CI runs" in TEXT
    script = (ROOT / ".ci" / "run").read_text()
    assert [line for line in script.splitlines() if line.startswith("make ")] == ["make lint test"]
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "bash .ci/run" in workflow


def test_where_additions_are_entered() -> None:
    assert "`_REGISTRY`" in section("Adding an estimator")
    assert "exact" in registry._REGISTRY
    terms = section("Adding a balancing term or a preset")
    assert "`LOSSES`" in terms
    assert "importance_loss" in losses.LOSSES
    assert "`python/torchmoe/presets.py`" in terms
    assert set(presets.PRESETS) <= set(presets.__all__)
    named = set(re.findall(r"`(\w*roundings)`", section("Adding an op")))
    assert named == {field.name for field in fields(OpCase) if field.name.endswith("roundings")}


def test_cmake_finds_new_files() -> None:
    assert "CMake finds new files" in TEXT
    globs = re.findall(
        r"file\(GLOB \w+ CONFIGURE_DEPENDS([^)]*)\)", (ROOT / "CMakeLists.txt").read_text()
    )
    patterns = " ".join(globs).split()
    for source in (
        *ROOT.glob("csrc/ops/*.cpp"),
        *ROOT.glob("csrc/autograd/*.cpp"),
        *ROOT.glob("csrc/cpu/*_kernel.cpp"),
        *ROOT.glob("csrc/cuda/*_kernel.*"),
    ):
        if source.suffix in (".cpp", ".cu"):
            name = source.relative_to(ROOT)
            assert any(name.match(pattern) for pattern in patterns), name


def test_data_that_raises_and_data_that_does_not() -> None:
    assert "Small tables and counts are the only data that raises" in " ".join(TEXT.split())
    indices = torch.tensor([[0, 7], [-3, 1]])
    nothing = torch.full((2, 2), torch.nan)
    plan = ops.dispatch_plan(indices, 2)
    ops.unpermute(ops.permute(nothing, plan), nothing, plan)
    ops.select_experts(nothing, 1)
    capacity = torch.tensor([1, -1])
    with pytest.raises(ValueError, match="limit_capacity: capacity must"):
        ops.limit_capacity(indices, capacity)
    with pytest.raises(ValueError, match="limit_capacity: backup must"):
        ops.limit_capacity(
            indices,
            capacity.abs(),
            overflow="backup",
            scores=nothing,
            backup=torch.tensor([0, 0]),
        )
    with pytest.raises(ValueError, match="tokens_per_expert must"):
        torchmoe.update_selection_bias(torch.zeros(2), capacity, 0.1)
    with pytest.raises(ValueError, match="num_tokens must"):
        torchmoe.expert_capacity(torch.tensor(-1), 2, 1, 1.0)
