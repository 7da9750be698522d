"""Lists in the reference that are read off the sources, so that a new name is there by itself.

A line of a page that begins with `% every` is replaced:

    % every class of torchmoe.nn.routers in torchmoe.nn, but ContextRouter, RouterOutput
    % every op of torchmoe.ops
    % every word of torchmoe.ops
    % every header of ops

The first three are the public names of a module: classes, functions and their results, or lists of
words. `in` says where the reference has them. The last is the headers of a folder of csrc/.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

from cpp_headers import NAMESPACE, all_headers
from sphinx.application import Sphinx

LINE = re.compile(r"^% every (\w+) of ([\w.]+)(?: in ([\w.]+))?(?:, but ([\w, ]+))?$", flags=re.M)
KINDS: Mapping[str, Callable[[str, object], bool]] = {
    "class": lambda _, value: inspect.isclass(value),
    "op": lambda _, value: inspect.isfunction(value) or inspect.isclass(value),
    "word": lambda name, _: name.isupper(),
}


def public_names(module: ModuleType, kind: str) -> list[str]:
    """The module's public names of a kind: those of `__all__`, else its own as they are written."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_")
            and (name.isupper() or getattr(value, "__module__", None) == module.__name__)
        ]
    return [name for name in names if KINDS[kind](name, getattr(module, name))]


def _directive(value: object) -> str:
    if inspect.isclass(value):
        return "autoclass"
    return "autofunction" if inspect.isfunction(value) else "autodata"


def _of_module(kind: str, source: str, shown_in: str | None, left_out: set[str]) -> str:
    module = importlib.import_module(source)
    names = [name for name in public_names(module, kind) if name not in left_out]
    return "\n".join(
        [
            "```{eval-rst}",
            f".. currentmodule:: {shown_in or source}",
            "",
            ".. autosummary::",
            "   :nosignatures:",
            "",
            *(f"   {name}" for name in names),
            "",
            *(f".. {_directive(getattr(module, name))}:: {name}" for name in names),
            "```",
        ]
    )


def _of_headers(csrc: Path, folder: str) -> str:
    names = sorted(
        name
        for name in all_headers(csrc)
        if name.startswith(f"{folder}/") and NAMESPACE.search((csrc / name).read_text("utf-8"))
    )
    return "\n\n".join(f"## {Path(name).stem}\n\n```{{doxygenfile}} {name}\n```" for name in names)


def _list_names(app: Sphinx, _page: str, source: list[str]) -> None:
    csrc = Path(app.confdir).parent / "csrc"

    def listed(line: re.Match[str]) -> str:
        kind, of, shown_in, left_out = line.groups()
        if kind == "header":
            return _of_headers(csrc, of)
        return _of_module(kind, of, shown_in, set((left_out or "").split(", ")))

    source[0] = LINE.sub(listed, source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects to Sphinx."""
    app.connect("source-read", _list_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
