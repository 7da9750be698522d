"""What README and the guides name is there: commands, options, links, names, and tables of them."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torchmoe
from documents import ROOT, anchors, blocks, code_spans, links, tables
from on_device import op_tests
from op_case import OpCase
from situations import SITUATIONS
from torchmoe import losses, nn, ops, presets, testing
from torchmoe.nn.estimators.registry import _REGISTRY

DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "ARCHITECTURE.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(DOCS.glob("*.md")),
    *sorted((ROOT / "studies").rglob("README.md")),
]
every_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix()
)

# --- commands -------------------------------------------------------------------------------------

MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", MAKEFILE, flags=re.MULTILINE))
VARIABLES = set(re.findall(r"\$\((\w+)\)", MAKEFILE)) | set(
    re.findall(r"^(\w+) [?:]?=", MAKEFILE, flags=re.MULTILINE)
)
EXTRAS = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE))
#: Test_cpp_guide.py, test_cpp_consumer.py and test_cpp_example.py build and run with these.
TRIED_ELSEWHERE = {"cmake", "build/program", "build/example/train_lm"}


def commands(page: Path) -> list[str]:
    """The commands in blocks of shell, and those that a sentence names."""
    program = re.compile(r"(\w+=\S+ )*(\.venv/bin/)?(make|python|pytest|torchrun) ")
    lines, named = [], [span for span in code_spans(page) if program.match(span)]
    for block in blocks(page):
        own = block.text.replace("\\\n", " ").splitlines()
        if block.language in ("sh", "console"):
            lines += [line.removeprefix("$ ") for line in own]
        elif block.language == "":  # which may be a formula
            named += [line for line in own if program.match(line)]
    return [line for line in (*lines, *named) if line.strip()]


def words_of(command: str) -> list[str]:
    """Without a comment, variables of the environment, and the folder of the program."""
    words = shlex.split(command, comments=True)
    while "=" in words[0]:
        words.pop(0)
    return [Path(words[0]).name if words[0].startswith(".venv/") else words[0], *words[1:]]


def program_of(target: str) -> tuple[str, ...]:
    """What a target's recipe hands its ARGS to, as arguments of Python."""
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)
    assert recipe is not None, f"make {target} has no recipe"
    found = re.search(r"PYTHON\)|/python\b", recipe[1])
    called = re.search(r"(?:/python|PYTHON\)) ((?:-m )?[\w./]+)(?: --run)? \$\(ARGS\)", recipe[1])
    assert found, f"make {target} runs no Python"
    assert called, f"make {target} takes no ARGS"
    return tuple(called[1].split())


@functools.cache
def help_of(*program: str) -> str:
    """What --help prints, which must work."""
    return subprocess.run(
        [sys.executable, *program, "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout


def has_option(help_text: str, option: str) -> bool:
    name = re.escape(option.partition("=")[0])
    return re.search(rf"(?<![\w-]){name}(?![\w-])", help_text) is not None


def check_options(program: tuple[str, ...], words: Iterable[str]) -> None:
    for option in (word for word in words if word.startswith("--")):
        assert has_option(help_of(*program), option), f"{' '.join(program)} has no {option}"


def check_make(words: list[str]) -> None:
    given = dict(word.split("=", 1) for word in words if "=" in word)
    targets = [word for word in words if "=" not in word]
    assert set(targets) <= TARGETS, f"the Makefile has not all of {targets}"
    assert given.keys() <= VARIABLES, f"the Makefile has not all of {given.keys()}"
    if arguments := shlex.split(given.get("ARGS", "")):
        check_options(program_of(targets[0]), arguments)


def check_python(words: list[str]) -> None:
    if words[0] == "-c":
        ast.parse(words[1])
    elif words[0] == "-m" and words[1] == "pytest":
        check_pytest(words[2:])
    elif words[0] == "-m":
        assert "." in words[1] or words[1] == "torchmoe"
        assert importlib.util.find_spec(words[1]) is not None, f"there is no module {words[1]}"
        check_options(("-m", words[1]), words[2:])
    else:
        assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"
        commands = takewhile(lambda word: not word.startswith("-"), words[1:])
        check_options((words[0], *commands), words[1:])


def check_pytest(words: list[str]) -> None:
    paths = [word for word in words if "/" in word]
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), f"there is no {path}"


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    for extra in re.findall(r"torchmoe\[(\w+)\]", " ".join(words)):
        assert extra in EXTRAS, f"there is no extra {extra}"


def check_torchrun(words: list[str]) -> None:
    (script,) = [word for word in words if word.endswith(".py")]
    check_python(words[words.index(script) :])


CHECKS: Mapping[str, Callable[[list[str]], None]] = {
    "make": check_make,
    "python": check_python,
    "pytest": check_pytest,
    "pip": check_pip,
    "torchrun": check_torchrun,
}


@every_page
def test_commands_are_real(page: Path) -> None:
    for command in commands(page):
        words = words_of(command)
        assert words[0] in {*CHECKS, *TRIED_ELSEWHERE}, f"{page.name}: {command}"
        if words[0] in CHECKS:
            CHECKS[words[0]](words[1:])


def test_there_are_commands_to_look_at() -> None:
    assert len(commands(README)) >= 6
    assert sum(len(commands(page)) for page in PAGES) >= 60


@pytest.mark.parametrize(
    "command",
    [
        "make trian",
        'make train ARGS="--layer 3"',
        "make test NOBODY=1",
        "python -m benchmarks.nobody",
        "python -m benchmarks.gating --nothing",
        "python examples/nobody.py",
        "pytest tests/python/nobody.py",
        "pip install 'torchmoe[nothing]'",
    ],
)
def test_a_command_that_is_not_real_is_found(command: str) -> None:
    first, *words = words_of(command)
    with pytest.raises(AssertionError):
        CHECKS[first](words)


def test_make_alone_lists_the_commands() -> None:
    listed = subprocess.run(["make"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for target in ("train", "test"):
        assert re.search(rf"^  make {target} ", listed, flags=re.MULTILINE)


def test_the_report_for_bugs_runs() -> None:
    assert "python -m torchmoe" in "".join(commands(README))
    command = [sys.executable, "-m", "torchmoe"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert torchmoe.__version__ in printed
    assert "built for" in printed


def test_the_certificate_of_the_shell_runs(tmp_path: Path) -> None:
    (command,) = [c for c in commands(DOCS / "certificates.md") if "--laws" in c]
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "layers.py").write_text(
        "from torchmoe.nn import MoE\n\n\ndef make_layer():\n    return MoE(16, 32, 4, 2)\n"
    )
    printed = subprocess.run(
        [sys.executable, *words_of(command)[1:]],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert printed.startswith("MoE: passed")


# --- links and names ------------------------------------------------------------------------------


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


@every_page
def test_names_are_there(page: Path) -> None:
    for span in code_spans(page):
        name = re.fullmatch(r"torchmoe((?:\.[A-Za-z]\w*)+)(?:\(.*\))?", span)
        if name is None or name[1].endswith("NAME"):
            continue
        found: Any = torchmoe
        for part in name[1][1:].split("."):
            if inspect.ismodule(found) and not hasattr(found, part):  # one imported by its name
                importlib.import_module(f"{found.__name__}.{part}")
            found = getattr(found, part)


@every_page
def test_no_line_is_a_comment(page: Path) -> None:
    """As MyST takes one that begins with a per cent sign, and leaves it out."""
    assert not re.search(r"^\s*%", page.read_text(), flags=re.MULTILINE)


@every_page
def test_headings_are_in_order(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    levels = [len(marks) for marks in re.findall(r"^(#+) ", text, flags=re.MULTILINE)]
    if not levels:  # the site's copy of a file that lies elsewhere
        assert "{include}" in page.read_text()
        return
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_readme_is_short_and_leads_to_every_guide() -> None:
    assert len(README.read_text().splitlines()) <= 150
    assert sum(link.endswith(".png") for link in links(README)) == 3
    linked = {(ROOT / link).resolve() for link in links(README) if link.startswith("docs/")}
    # What these lead to, and the site itself.
    further = {"measured_cpu", "measured_cuda", "cpu_kernels", "mutants", "index"}
    further |= {"architecture", "contributing", "changelog"}  # the site's copies
    missing = {page for page in DOCS.glob("*.md") if page.stem not in further} - linked
    assert not missing


def test_readme_has_the_floors_of_the_package() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (python,) = re.findall(r'requires-python = ">=([\d.]+)"', project)
    rows = {row[0]: row[1] for table in tables(README) for row in table}
    assert rows["Python"].startswith(f"{python} and later")
    (floor,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "setup.py").read_text())
    assert rows["torch"].startswith(f"{floor} and later")


# --- tables ---------------------------------------------------------------------------------------

#: What a table with the head "field of `X`" or "argument of `X`" lists.
LISTED: Mapping[str, Any] = {
    "Assistance": nn.Assistance,
    "Balance": nn.Balance,
    "Capacity": nn.Capacity,
    "Gate": nn.Gate,
    "MoE": nn.MoE,
    "Router": nn.Router,
    "RoutingStatistics": torchmoe.RoutingStatistics,
    "gradcheck": testing.gradcheck,
    "moe(x)": nn.MoE.forward,
    "output": nn.MoEOutput,
    "routing": nn.Routing,
    "watch": torchmoe.watch,
}
_HEAD = re.compile(r"(?:field|argument) of `([^`]+)`")


def fields_of(listed: Any) -> dict[str, Any]:
    """Names and defaults, `inspect.Parameter.empty` where there is none."""
    if dataclasses.is_dataclass(listed):
        return {
            f.name: inspect.Parameter.empty if f.default is dataclasses.MISSING else f.default
            for f in dataclasses.fields(listed)
            if f.init
        }
    if hasattr(listed, "_fields"):
        return dict.fromkeys(listed._fields, inspect.Parameter.empty)
    parameters = inspect.signature(listed).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "self"}


def code(cell: str) -> list[str]:
    """What a cell has between backticks."""
    return re.findall(r"`([^`]+)`", cell)


SETTINGS = [
    (page, table, head[1])
    for page in PAGES
    for table in tables(page)
    if (head := _HEAD.fullmatch(table[0][0]))
]


@pytest.mark.parametrize(("page", "table", "name"), SETTINGS, ids=[s[2] for s in SETTINGS])
def test_tables_of_settings(page: Path, table: list[list[str]], name: str) -> None:
    fields = fields_of(LISTED[name])
    assert {n for row in table[1:] for n in code(row[0])} == fields.keys()
    if table[0][1] != "default":
        return
    for row in table[1:]:
        names = code(row[0])
        for field, shown in zip(names, _defaults(row[1], len(names)), strict=True):
            default = fields[field]
            if default is inspect.Parameter.empty:
                assert shown == "", field
            elif default is None:
                assert shown == "None" or not _is_literal(shown), field
            else:
                assert ast.literal_eval(shown) == default, field


def _defaults(cell: str, number: int) -> list[str]:
    return [cell] * number if cell.count(",") != number - 1 else cell.split(", ")


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return False
    return True


def test_the_settings_have_tables() -> None:
    assert {name for _, _, name in SETTINGS} == LISTED.keys()


def column(page: str, head: str) -> list[set[str]]:
    """The names in the first column of each table of a guide that begins with this head."""
    found = [table for table in tables(DOCS / page) if table[0][0] == head]
    return [{n for row in table[1:] for n in code(row[0])} for table in found]


def test_the_tables_of_estimators() -> None:
    first, *others = column("estimators.md", "name")
    # Another test may have registered more.
    built_in = {n for n, kind in _REGISTRY.items() if kind.__module__.startswith("torchmoe.")}
    assert first == built_in
    assert len(others) == 3
    assert all(names == built_in for names in others)


def test_the_tables_of_balance() -> None:
    (listed,) = column("balance.md", "preset")
    assert listed == presets.PRESETS.keys()
    (terms,) = column("balance.md", "term or rule")
    assert losses.LOSSES.keys() | {"load_balancing_loss"} <= terms
    found = [table for table in tables(DOCS / "balance.md") if table[0][0] == "`fraction_from`"]
    assert len(found) == 2
    for table in found:
        shown = {word for row in table[1:] for word in re.findall(r'"(\w+)"', row[0])}
        assert shown == set(ops.FRACTIONS_FROM)


def test_the_options_of_the_training_program() -> None:
    """All of them are in the tables."""
    listed = set().union(*column("training.md", "option"))
    parser = set(re.findall(r"^  (--[\w-]+)", help_of("examples/train_lm.py"), flags=re.MULTILINE))
    assert listed == parser - {"--help"}
    assert len(listed) > 20


# --- the table of ops -----------------------------------------------------------------------------

OPS = {
    name.removeprefix("torchmoe::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("torchmoe::") and not name.startswith("torchmoe::_")
}
ROWS = {
    code(row[0])[0]: row
    for table in tables(DOCS / "ops.md")
    if table[0][0] == "op"
    for row in table[1:]
}


@functools.cache
def cases() -> dict[str, OpCase]:
    return {kind.case.name: kind.case for kind in op_tests(on_cpu_alone=True)}


def test_the_table_of_ops_has_them_all() -> None:
    assert ROWS.keys() == OPS == cases().keys()
    assert all(hasattr(ops, name) for name in OPS)
    for name, row in ROWS.items():
        assert row[0] == f"[`{name}`](../csrc/ops/{name}.h)"


@pytest.mark.parametrize("name", sorted(OPS))
def test_what_an_op_is_differentiable_in(name: str) -> None:
    shown = {part for part in ROWS[name][2].split(", ") if part}
    assert shown == set(differentiable(cases()[name]))


def differentiable(case: OpCase) -> list[str]:
    """The inputs which alone give the result a graph."""
    inputs = case.make(SITUATIONS["plain"], torch.float64, **case.variants[0])
    floating = [n for n, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()]
    found = []
    for name in floating:
        leaf = inputs[name].detach().clone().requires_grad_()
        if any(y.requires_grad for y in case(inputs | {name: leaf})):
            found.append(name)
    return found
