"""Every study in its smallest form, begun as a user begins it: what it prints, writes and refuses.

The full tests are marked `study`; these stay with all others.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.machine import processor
from lm_command_line import OPTION_NAMES
from refused import refused

ROOT = Path(__file__).parents[3]
OF_A_COMPARISON = ["--seeds", "--jobs"]


@dataclass(frozen=True)
class Study:
    """How a study is run here."""

    options: str
    """The least that it can do; it has a text and a small model where it trains train_lm.py's."""
    files: str
    """What its files are called."""
    results: list[str]
    """What it compares."""
    sentence: str
    """One that it prints."""
    own_options: list[str]
    """Those that train_lm.py does not have."""
    trains_lm: bool = True


STUDIES = {
    "dense": Study(
        options="--steps 2 --seeds 1 --jobs 1 --candidates E4-K2 W32",
        files="dense",
        results=["first", "second"],
        sentence=r"^first: one seed gives no interval$",
        own_options=["--candidates", "--second-data", *OF_A_COMPARISON],
    ),
    "estimators": Study(
        options="--steps 2 --seeds 1 --jobs 1 --estimators straight_through",
        files="estimators",
        results=["exact", "straight_through"],
        sentence="^straight_through: n/a, one seed gives no interval$",
        own_options=["--estimators", *OF_A_COMPARISON],
    ),
    "routers": Study(
        options="--steps 2 --seeds 1 --jobs 1 --routers linear+communication",
        files="routers",
        results=["linear", "linear+communication"],
        sentence=r"^linear\+communication: n/a, one seed gives no interval$",
        own_options=["--routers", *OF_A_COMPARISON],
    ),
    "balance": Study(
        options="--steps 3 --seeds 2 --methods selection_bias",
        files="balance",
        results=["control", "selection_bias"],
        sentence="^not recovered: control, selection_bias$",
        own_options=["--methods", "--steps", "--seeds", "--lr", "--out"],
        trains_lm=False,
    ),
    "classification": Study(
        options="--steps 2 --seeds 1 --routers linear sequence_first",
        files="classification-domain",
        results=["linear", "sequence_first"],
        sentence=r"^With the texts' classes shuffled the experts still tell up to \d\.\d\d bits\.$",
        own_options=[
            *("--task", "--routers", "--steps", "--seeds", "--lr", "--domain", "--modules"),
            *("--data", "--out"),
        ],
        trains_lm=False,
    ),
    "routing_cache": Study(
        options="--small --steps 2 --seeds 2",
        files="routing_cache",
        results=["queries", "training", "text", "stream", "time"],
        sentence=r"^texts that come again exactly: at least \d+\.\d % hit, ",
        own_options=["--small", "--seeds", "--steps", "--data", "--out"],
        trains_lm=False,
    ),
}
HAVE_DATA = ("classification", "routing_cache")
every_study = pytest.mark.parametrize("name", STUDIES)


def test_every_study_is_here() -> None:
    found = {path.parent.name for path in (ROOT / "studies").glob("*/__main__.py")}
    assert found == set(STUDIES)


@every_study
def test_runs_and_writes(name: str, data: list[str], tiny: list[str], tmp_path: Path) -> None:
    study, out = STUDIES[name], tmp_path / "new" / "folder"
    inputs = tiny if study.trains_lm else ["--data", *data] if name in HAVE_DATA else []
    arguments = [*inputs, *study.options.split(), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", f"studies.{name}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(study.sentence, done.stdout, re.MULTILINE)
    assert "…" not in done.stdout  # nothing is cut off

    png, svg, numbers, page = (out / f"{study.files}.{end}" for end in ("png", "svg", "json", "md"))
    for path in (png, svg, numbers, page):
        assert str(path) in done.stdout
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    assert len(ElementTree.parse(svg).findall(".//{*}path")) > 20
    written = json.loads(numbers.read_text())
    assert list(written["results"]) == study.results

    about, *parts = page.read_text().split("\n\n")
    command = shlex.join(["python", "-m", f"studies.{name}", *arguments])
    assert about.startswith(f"Written by `{command}` at revision {written['git_revision']}, ")
    assert re.fullmatch(r"[0-9a-f]{7,}(-changed)?|unknown", written["git_revision"])
    assert written["processor"] == processor()
    assert f" cores of {processor()} (" in about
    tables = [part for part in parts if part.startswith("|")]
    assert tables
    for table in tables:
        check_table(table, done.stdout)
    names = [row.split("|")[1].strip() for row in tables[0].splitlines()[2:]]
    assert names[: len(study.results)] == study.results


def check_table(table: str, printed: str) -> None:
    """Its rows have as many cells as its head, and all that they hold was printed too."""
    head, marks, *rows = table.splitlines()
    count = head.count("|")
    assert count >= 3
    assert re.fullmatch(rf"\|---(\|---:){{{count - 2}}}\|", marks)
    assert rows
    for row in rows:
        assert row.startswith("| ")
        assert row.endswith(" |")
        assert row.count("|") == count
        assert all(cell.strip() in printed for cell in row.split("|"))


@every_study
def test_help_names_all_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = import_module(f"studies.{name}.program").main
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: python -m studies.{name} ")
    listed = set(re.findall(r"^  (--[a-z-]+)", shown, re.MULTILINE))
    study = STUDIES[name]
    assert listed - {"--no-communication", "--no-compile"} == {
        *study.own_options,
        *(OPTION_NAMES if study.trains_lm else ()),
    }


@every_study
def test_a_wrong_option_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = import_module(f"studies.{name}.program").main
    output, error = refused(capsys, main, "--seeds", "none")
    assert output == ""
    assert error == (
        f"python -m studies.{name}: error: argument --seeds: must be a whole number from 1 to 100, "
        "got 'none' (--help lists the options)\n"
    )


@every_study
def test_is_run_as_a_program_is(name: str) -> None:
    source = (ROOT / "studies" / name / "__main__.py").read_text()
    assert source.endswith("\nterminal.run(main)\n")
