"""The public headers of csrc/ as Doxygen reads them and Breathe shows them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util import logging

ENTRIES = ("torchmoe.h", "testing.h")
INCLUDE = re.compile(r'^#include "(.+)"$', flags=re.MULTILINE)
#: A namespace for users, which headers of details alone do not open.
NAMESPACE = re.compile(r"^namespace (?!.*\bdetail\b)", flags=re.MULTILINE)
#: Declarations for the library's own rooms, with the comment above them.
CHECKS = re.compile(r"^(?:///.*\n)*void check_\w+\([^;]*;\n", flags=re.MULTILINE)
MODULE = re.compile(r"^TORCH_MODULE\((\w+)\);$", flags=re.MULTILINE)
#: What Doxygen calls the section of a kind of member.
SECTIONS = {"function": "func", "typedef": "typedef", "variable": "var", "enum": "enum"}
HOLDER = r"""/// A shared pointer to a `\1Impl`, made from the same arguments: `\1(...)->forward()`.
class \1 : public torch::nn::ModuleHolder<\1Impl> {};"""


def public_headers(csrc: Path) -> list[str]:
    """What torchmoe.h and testing.h include for users, they themselves last, relative to csrc."""
    included = [
        name for entry in ENTRIES for name in INCLUDE.findall((csrc / entry).read_text("utf-8"))
    ]
    return [
        *(name for name in included if NAMESPACE.search((csrc / name).read_text("utf-8"))),
        *ENTRIES,
    ]


def all_headers(csrc: Path) -> list[str]:
    """The public headers, and those that they include in turn, relative to csrc."""
    found: list[str] = []
    waiting = public_headers(csrc)
    while waiting:
        name = waiting.pop(0)
        if name in found:
            continue
        found.append(name)
        for other in INCLUDE.findall((csrc / name).read_text("utf-8")):
            path = (csrc / name).parent / other
            waiting.append(path.resolve().relative_to(csrc.resolve()).as_posix())
    return found


def for_doxygen(header: str) -> str:
    """The header without checks, with the comment at its head and what its macros declare."""
    head, pragma, body = header.partition("#pragma once\n")
    if head:
        head = "/// @file\n" + re.sub(r"^//", "///", head, flags=re.MULTILINE)
    return head + pragma + MODULE.sub(HOLDER, CHECKS.sub("", body))


def _move_to_files(xml: Path) -> None:
    """Moves what namespaces hold to their files, which else show their namespaces too."""
    members: dict[str, list[ElementTree.Element]] = {}
    for path in xml.glob("namespace*.xml"):
        for member in ElementTree.parse(path).iter("memberdef"):
            name, location = member.find("name"), member.find("location")
            assert name is not None
            assert location is not None
            name.text = member.findtext("qualifiedname")
            members.setdefault(location.attrib["file"], []).append(member)
    for path in xml.glob("*_8h.xml"):
        tree = ElementTree.parse(path)
        (header,) = tree.iter("compounddef")
        for namespace in header.findall("innernamespace"):
            header.remove(namespace)
        file = header.find("location")
        assert file is not None
        for member in members.get(file.attrib["file"], []):
            kind = SECTIONS[member.attrib["kind"]]
            section = header.find(f"sectiondef[@kind='{kind}']")
            if section is None:
                section = ElementTree.SubElement(header, "sectiondef", kind=kind)
            section.append(member)
        tree.write(path, encoding="utf-8")


def _leave_out_private(xml: Path) -> None:
    """Takes out the classes' private members, which Breathe would list with a header's classes."""
    for path in [*xml.glob("class*.xml"), *xml.glob("struct*.xml")]:
        tree = ElementTree.parse(path)
        (of,) = tree.iter("compounddef")
        for section in of.findall("sectiondef"):
            if section.attrib["kind"].startswith("private"):
                of.remove(section)
        tree.write(path, encoding="utf-8")


def _run_doxygen(app: Sphinx) -> None:
    if shutil.which("doxygen") is None:
        raise ExtensionError("the C++ reference needs doxygen: apt-get install doxygen")
    here, folder = Path(app.confdir), Path(app.doctreedir) / "doxygen"
    shutil.rmtree(folder, ignore_errors=True)
    csrc = here.parent / "csrc"
    for name in all_headers(csrc):
        copy = folder / "headers" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(for_doxygen((csrc / name).read_text("utf-8")), "utf-8")
    settings = (here / "Doxyfile").read_text("utf-8")
    settings += f'\nINPUT="{folder}/headers"\nSTRIP_FROM_PATH="{folder}/headers"\n'
    settings += f'OUTPUT_DIRECTORY="{folder}"\n'
    ran = subprocess.run(
        ["doxygen", "-"], input=settings, text=True, capture_output=True, check=False
    )
    for line in ran.stderr.splitlines():
        logging.getLogger(__name__).warning("%s", line.replace(f"{folder}/headers", "csrc"))
    if ran.returncode:
        raise ExtensionError(f"doxygen failed with {ran.returncode}")
    for path in (folder / "xml").glob("*.xml"):  # which Doxygen puts into */ inside of a comment
        path.write_text(path.read_text("utf-8").replace("&amp;zwj;", ""), "utf-8")
    _move_to_files(folder / "xml")
    _leave_out_private(folder / "xml")
    app.config.breathe_projects = {"torchmoe": str(folder / "xml")}


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects to Sphinx, before Breathe looks for what Doxygen wrote."""
    app.connect("builder-inited", _run_doxygen, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
