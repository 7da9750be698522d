"""Links to the repository's files, as a repository host shows them, made links of the site.

A link to `../ARCHITECTURE.md` or `tutorials/first_layer.py` leads to the page made of that file,
one to a public header to its place in the C++ reference, and one to any other file or folder to a
page that shows it. A link to a file that is not there is a warning.
"""

from __future__ import annotations

import html
import posixpath
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import cpp_headers
from docutils import nodes
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.builders.html import StandaloneHTMLBuilder
from sphinx.transforms import SphinxTransform

#: Files outside of docs/ of which a page is made.
PAGES = {
    "README.md": "index",
    "ARCHITECTURE.md": "architecture",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "csrc/torchmoe.h": "reference/cpp/index",
    "docs/tutorials": "gallery/index",
    "studies": "studies/index",
    "studies/README.md": "studies/index",
}
#: Where the site shows a file or folder of which no page is made.
SHOWN = "source"
#: What is handed out as it is.
PICTURES = (".png", ".svg")
#: What is shown of a folder: what else lies there may be no text, or nobody's business.
SHOWN_SUFFIXES = (".py", ".md", ".h", ".cpp", ".txt", ".toml")


def page_of(path: str, root: Path) -> tuple[str, str | None] | None:
    """The page, and the heading on it, that is made of a file or folder of the repository."""
    if path in PAGES:
        return PAGES[path], None
    pure = PurePosixPath(path)
    if not pure.parts:
        return None
    if pure.parts[:2] == ("docs", "tutorials") and pure.suffix == ".py":
        return f"gallery/{pure.stem}", None
    if pure.parts[0] == "docs" and pure.suffix == ".md":
        return pure.relative_to("docs").with_suffix("").as_posix(), None
    study = pure.parent if pure.name == "README.md" else pure
    if study.parent.name == "studies" and (root / study / "README.md").is_file():
        return study.as_posix(), None
    if pure.parts[0] == "csrc":
        header = pure.relative_to("csrc").as_posix()
        if header in cpp_headers.public_headers(root / "csrc"):
            return f"reference/cpp/{pure.parts[1].removesuffix('.h')}", pure.stem
    return None


class RepositoryLinks(SphinxTransform):
    """Leads links out of docs/ to pages of the site."""

    default_priority = 700

    def apply(self, **kwargs: Any) -> None:  # noqa: ANN401 (docutils' own)
        """Changes the links of one page that MyST has left for later."""
        for link in list(self.document.findall(nodes.Element)):
            if link.get("reftype") != "myst":
                continue
            if (found := self._path_of(link)) is not None:
                self._lead(link, *found)

    def _path_of(self, link: nodes.Element) -> tuple[str, str | None] | None:
        """What the link names in the repository, and the heading; None where MyST knows more."""
        target: str = link["reftarget"]
        fragment: str | None = link.get("reftargetid")
        file = Path(link.source or "")  # a page, or what the page includes
        included = file != Path(self.env.doc2path(self.env.docname))
        if isinstance(link, pending_xref) and link["refdomain"] == "doc":
            if target in self.env.found_docs and not included:
                return None
            # A page's name, or the whole path of a file that is none.
            page = posixpath.join(Path(self.env.srcdir).as_posix(), target + ".md")
            here = posixpath.dirname(self.env.doc2path(self.env.docname))
            target = posixpath.relpath(page, here)
        else:
            target, _, after = target.partition("#")
            fragment = after or None
        folder = posixpath.relpath(file.parent.as_posix(), self.root.as_posix())
        path = posixpath.normpath(posixpath.join(folder, target))
        if not target or path.startswith("..") or not (self.root / path).exists():
            return None  # a name of MyST's, or nothing at all, of which MyST warns
        return path, fragment

    @property
    def root(self) -> Path:
        """The repository."""
        return Path(self.app.confdir).parent

    def _lead(self, link: nodes.Element, path: str, fragment: str | None) -> None:
        page = page_of(path, self.root)
        if page is not None:
            docname, heading = page
            new: nodes.Element = pending_xref(
                "",
                *link.children,
                refdomain="doc",
                refdoc=self.env.docname,
                reftype="myst",
                reftarget=docname,
                reftargetid=fragment or heading,
                refexplicit=link["refexplicit"],
            )
        elif path.endswith(PICTURES):
            return
        else:
            self.env.metadata[self.env.docname].setdefault("shown_files", []).append(path)
            uri = self.app.builder.get_relative_uri(self.env.docname, f"{SHOWN}/{path}")
            new = nodes.reference("", "", *link.children, internal=True, refuri=uri)
        new.source, new.line = link.source, link.line
        for child in new.findall(nodes.inline):
            child["classes"] = [name for name in child["classes"] if name != "download"]
        link.replace_self(new)


def _entries(path: Path) -> list[Path]:
    return sorted(
        (
            p
            for p in path.iterdir()
            if not p.name.startswith((".", "__pycache__"))
            and (p.is_dir() or p.suffix in SHOWN_SUFFIXES)
        ),
        key=lambda p: (p.is_file(), p.name),
    )


def _shown(app: Sphinx, path: str) -> str:
    """A file's or folder's page, as HTML."""
    file = Path(app.confdir).parent / path
    heading = f"<h1><code>{html.escape(path)}</code></h1>\n"
    if file.is_dir():
        items = "".join(
            f'<li><a href="{uri}">{html.escape(p.name)}</a></li>\n'
            for p in _entries(file)
            for uri in [app.builder.get_relative_uri(f"{SHOWN}/{path}", f"{SHOWN}/{path}/{p.name}")]
        )
        return f"{heading}<ul>\n{items}</ul>\n"
    try:
        lexer = get_lexer_for_filename(path).aliases[0]
    except ClassNotFound:
        lexer = "text"
    assert isinstance(app.builder, StandaloneHTMLBuilder)
    return heading + str(app.builder.highlighter.highlight_block(file.read_text("utf-8"), lexer))


def _show_files(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The pages of the files and folders that other pages lead to."""
    waiting = [path for data in app.env.metadata.values() for path in data.get("shown_files", [])]
    done: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in done:
            continue
        done.add(path)
        file = Path(app.confdir).parent / path
        if file.is_dir():
            waiting += [posixpath.join(path, p.name) for p in _entries(file)]
        yield f"{SHOWN}/{path}", {"title": path, "body": _shown(app, path)}, "page.html"


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects to Sphinx."""
    app.add_transform(RepositoryLinks)
    app.connect("html-collect-pages", _show_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
