"""The docstrings' markup, which is plain text with blocks and names, as reStructuredText.

A block that stands deeper than the paragraph before it is a formula or code. A name in single
backticks is code, and a link where the reference has that name. Asterisks and bars mean themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from docutils import nodes
from docutils.parsers.rst.states import Inliner
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

#: Before napoleon's own handler, which reads the sections.
BEFORE_NAPOLEON = 400
#: Where a name without its module is looked for, after the module of the docstring.
MODULES = ("torchmoe", "torchmoe.nn", "torchmoe.ops", "torchmoe.losses", "torchmoe.testing")
CODE = re.compile(r"(``.+?``|`[^`]+`)", flags=re.DOTALL)
RESULT = re.compile(r"\s*(Returns|Yields):")
ITEM = re.compile(r"\s*([*-]|\d+\.) ")


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def _escaped(line: str) -> str:
    """The line with the characters outside of code that would be markup escaped."""
    bullet = ITEM.match(line)
    start = bullet.end() if bullet else _depth(line)
    parts = CODE.split(line[start:])
    parts[::2] = [re.sub(r"[*|]|(?<=\w)_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
    # A letter and a full stop are no item of a list.
    return line[:start] + re.sub(r"(^|: )([A-Z])\.$", r"\1\2\\.", "".join(parts))


def restructured(lines: Sequence[str]) -> Iterator[str]:
    """The docstring's lines as reStructuredText."""
    block: int | None = None  # the depth of the block that the lines are in
    paragraph = 0  # that of the last line outside of one
    for number, line in enumerate(lines):
        if not line.strip():
            yield line
            continue
        depth = _depth(line)
        if block is not None and depth < block:
            block = None
        after_blank = number > 0 and not lines[number - 1].strip()
        if block is None and after_blank and depth > paragraph and not ITEM.match(line):
            block = depth
            yield from (" " * paragraph + "::", "")
        if number > 0 and RESULT.fullmatch(lines[number - 1]):
            line = " " * depth + ": " + line.lstrip()  # else napoleon takes its words for a type
        if block is None:
            bullet = ITEM.match(line)
            paragraph = bullet.end() if bullet else depth
            line = _escaped(line)
        yield line


def _restructure(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    lines[:] = restructured(lines)
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # else napoleon takes what is before the first colon for a type


def _code(
    role: str,
    rawtext: str,
    text: str,
    lineno: int,
    inliner: Inliner,
    options: dict[str, Any] | None = None,
    content: Sequence[str] = (),
) -> tuple[list[nodes.Node], list[nodes.system_message]]:
    """What stands in single backticks: code, and a link where it is a name of the reference."""
    env: BuildEnvironment = inliner.document.settings.env
    target = text.removesuffix("()")
    literal = nodes.literal(rawtext, text)
    if not re.fullmatch(r"[A-Za-z_][\w.]*", target):
        return [literal], []
    reference = pending_xref(
        "",
        literal,
        refdomain="py",
        reftype="obj",
        reftarget=target,
        refdoc=env.docname,
        from_docstring=True,
    )
    reference["py:module"] = env.ref_context.get("py:module")
    reference["py:class"] = env.ref_context.get("py:class")
    return [reference], []


def _elsewhere_or_code(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement
) -> nodes.Element | None:
    """A link to another module's name; else code, such as the name of an argument."""
    if not node.get("from_docstring"):
        return None
    domain = env.domains.python_domain
    for module in MODULES:
        name = f"{module}.{node['reftarget']}"
        if found := domain.objects.get(name):
            return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, contnode)
    return contnode


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects to autodoc and to Sphinx."""
    app.connect("autodoc-process-docstring", _restructure, priority=BEFORE_NAPOLEON)
    app.connect("missing-reference", _elsewhere_or_code)
    app.add_role("code-or-name", _code)
    app.config.default_role = "code-or-name"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
