"""Notes in docs/support.md what the library was compiled or tested with here.

python tests/support.py compiled|tested: called by `make support` after each has come to a good end,
with the Python and the build that were used. The entries are kept in docs/support.json, or in the
file that the environment variable SUPPORT names; the page of that name is written next to it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path

import torch

import torchmoe

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TORCHES = ("2.11", "2.12", "2.13")
LEVELS = ("compiled", "tested")
#: What one entry is about; a later one about the same takes its place.
KEY = ("system", "compiler", "python", "torch")
HEAD = """\
# Support

Written by `make support`; for another torch, Python or compiler by
`make support-torch TORCH=torch==2.11.0 PYTHON=python3.12 CXX=clang++-16`. *Tested*: the whole of
`make test` passed. *Compiled*: the library and its C++ tests were built. *Unknown*: nobody has
tried. The library calls nothing of Python's, so that one file serves each."""


def entry(level: str) -> dict[str, str]:
    """What is at work here."""
    return {
        "system": f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.machine()}, "
        f"{' '.join(platform.libc_ver())}",
        "compiler": torchmoe.build_info()["compiler"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda or "none",
        "torchmoe": torchmoe.__version__,
        "level": level,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def merged(entries: list[dict[str, str]], new: dict[str, str]) -> list[dict[str, str]]:
    """The entries with one more, in the order of what they are about."""

    def key(entry: dict[str, str]) -> tuple[str, ...]:
        return tuple(entry[name] for name in KEY)

    return sorted([*(old for old in entries if key(old) != key(new)), new], key=key)


def minor(version: str) -> str:
    """3.11 of 3.11.7, 2.13 of 2.13.0+cpu."""
    return ".".join(version.split(".")[:2])


def page(entries: list[dict[str, str]]) -> str:
    """A table of Python by torch for each system and compiler, and what each cell stands for."""
    lines = [HEAD]
    for (system, compiler), group in groupby(entries, lambda e: (e["system"], e["compiler"])):
        levels: dict[tuple[str, str], str] = {}
        for one in group:
            cell = minor(one["python"]), minor(one["torch"])
            levels[cell] = max(levels.get(cell, ""), one["level"], key=("", *LEVELS).index)
        pythons = sorted({*PYTHONS, *(python for python, _ in levels)}, key=in_order)
        torches = sorted({*TORCHES, *(torch for _, torch in levels)}, key=in_order)
        lines += [f"\n## {system}, {compiler}\n"]
        lines += ["| | " + " | ".join(f"torch {torch}" for torch in torches) + " |"]
        lines += ["|---" * (len(torches) + 1) + "|"]
        for python in pythons:
            cells = (levels.get((python, torch), "unknown") for torch in torches)
            lines += [f"| Python {python} | " + " | ".join(cells) + " |"]
    lines += [
        "\n## Every entry\n",
        "| system | compiler | Python | torch | its CUDA | torchmoe | |",
    ]
    lines += ["|---" * 7 + "|"]
    for one in entries:
        facts = [one[name] for name in (*KEY, "torch_cuda", "torchmoe")]
        lines += ["| " + " | ".join([*facts, f"{one['level']}, {one['date']}"]) + " |"]
    return "\n".join(lines) + "\n"


def in_order(version: str) -> tuple[int, ...]:
    """Makes 3.9 come before 3.10."""
    return tuple(int(part) for part in version.split("."))


def main() -> None:
    """Adds one entry and writes the page again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("level", choices=LEVELS)
    level = parser.parse_args().level
    default = Path(__file__).resolve().parents[1] / "docs" / "support.json"
    file = Path(os.environ.get("SUPPORT", default))
    entries = json.loads(file.read_text()) if file.exists() else []
    entries = merged(entries, entry(level))
    file.write_text(json.dumps(entries, indent=2) + "\n")
    file.with_suffix(".md").write_text(page(entries))


if __name__ == "__main__":
    main()
