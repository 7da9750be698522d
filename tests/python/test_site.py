"""The documentation site: no warning, no broken link, and every public name."""

from __future__ import annotations

import importlib
import inspect
import posixpath
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = [
    pytest.mark.needs_build,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("doxygen") is None, reason="needs doxygen"),
]

ROOT = Path(__file__).resolve().parents[2]
EXTENSIONS = ROOT / "docs" / "_extensions"
#: What users import.
MODULES = (
    "torchmoe",
    "torchmoe.convert",
    "torchmoe.integrations.transformers",
    "torchmoe.losses",
    "torchmoe.nn",
    "torchmoe.offload",
    "torchmoe.ops",
    "torchmoe.presets",
    "torchmoe.testing",
)
#: Attributes of a page's elements that name a file which a browser loads by itself.
LOADED = {"img": "src", "script": "src", "link": "href", "source": "src", "iframe": "src"}


def build(docs: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs Sphinx, with warnings as errors."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", *options]
    return subprocess.run(
        [*command, "-d", out.parent / "doctrees", docs, out],
        capture_output=True,
        text=True,
        check=False,
    )


class Page(HTMLParser):
    """What a page can be led to, and where it leads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors = {""}
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes the element's id and the files it names."""
        named = {name: value for name, value in attrs if value is not None}
        self.anchors |= {named[key] for key in ("id", "name") if key in named}
        self.links += [named[key] for key in ("href", "src") if key in named]
        if tag in LOADED and LOADED[tag] in named and named.get("rel") != "canonical":
            self.loaded.append(named[LOADED[tag]])


def broken_links(folder: Path) -> list[str]:
    """Every link of the pages in `folder` to a file or heading that is not there."""
    pages = {path: Page(path) for path in sorted(folder.rglob("*.html"))}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = Path(posixpath.normpath(path.parent / unquote(parts.path)))
            target = target if parts.path else path
            known = pages.get(target)
            if not target.is_file() or (known and unquote(parts.fragment) not in known.anchors):
                broken.append(f"{path.relative_to(folder)}: {link}")
    return broken


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Sphinx's run, and its pages.

    The sources are a copy, as the gallery writes next to them, next to links to all else.
    """
    copy = tmp_path_factory.mktemp("site")
    for path in ROOT.iterdir():
        if path.name != "docs" and not path.name.startswith("."):
            (copy / path.name).symlink_to(path)
    ignored = shutil.ignore_patterns("gallery", "__pycache__")
    shutil.copytree(ROOT / "docs", copy / "docs", ignore=ignored)
    out = copy / "out" / "html"
    return build(copy / "docs", out, "-D", "plot_gallery=0"), out


def test_the_site_builds_without_a_warning(
    built: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    ran, out = built
    assert ran.stderr == ""
    assert ran.returncode == 0
    assert (out / "index.html").is_file()


def test_every_link_leads_somewhere(built: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, out = built
    assert len(list(out.rglob("*.html"))) > 30
    assert broken_links(out) == []


def test_nothing_is_loaded_from_elsewhere(
    built: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    _, out = built
    loaded = [(page, link) for page in out.rglob("*.html") for link in Page(page).loaded]
    assert len(loaded) > 100
    assert [(page, link) for page, link in loaded if urlsplit(link).netloc] == []
    for sheet in out.rglob("*.css"):
        text = sheet.read_text("utf-8")
        assert "url(http" not in text.replace('"', "").replace("'", ""), sheet
        assert "@import" not in text or "http" not in text.split("@import")[1][:200], sheet


def public_names(module: str) -> list[str]:
    """The names of a module for users, without the modules among them."""
    imported = importlib.import_module(module)
    own = [
        name
        for name, value in vars(imported).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module
    ]
    names = getattr(imported, "__all__", own)
    return [f"{module}.{n}" for n in names if not inspect.ismodule(getattr(imported, n))]


def in_reference(out: Path, domain: str) -> set[str]:
    """The names of a language that the built reference has."""
    from sphinx.util.inventory import InventoryFile

    with (out / "objects.inv").open("rb") as file:
        kinds = InventoryFile.load(file, "", posixpath.join)
    return {
        name for kind, items in kinds.items() if kind.startswith(domain + ":") for name in items
    }


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_has_every_public_name(
    module: str, built: tuple[subprocess.CompletedProcess[str], Path]
) -> None:
    names = public_names(module)
    assert len(names) >= 2
    assert set(names) - in_reference(built[1], "py") == set()


def test_the_reference_has_every_public_header(
    built: tuple[subprocess.CompletedProcess[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXTENSIONS)
    import cpp_headers

    headers = cpp_headers.public_headers(ROOT / "csrc")
    assert len(headers) > 30
    pages = "".join(p.read_text() for p in (ROOT / "docs" / "reference" / "cpp").glob("*.md"))
    folders = re.findall(r"^% every header of (\w+)$", pages, flags=re.M)
    assert folders == ["ops"]
    for header in headers:
        times = pages.count(f"{{doxygenfile}} {header}\n") + header.startswith("ops/")
        assert times == 1, header
    names = in_reference(built[1], "cpp")
    ops = {f"torchmoe::{Path(h).stem}" for h in headers if h.startswith("ops/")}
    assert ops - names == set()
    assert {
        "torchmoe::nn::MoE",
        "torchmoe::nn::MoEImpl::forward",
        "torchmoe::testing::certify",
    } <= names
    assert not [n for n in names if "::check_" in n or "::detail::" in n]


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="#here"><a href="#gone"><a href="b.html#there"><a href="b.html#gone">'
        '<a href="https://example.org/gone"><img src="gone.png"></p>'
    )
    (tmp_path / "b.html").write_text('<p id="there"></p>')
    broken = ["a.html: #gone", "a.html: b.html#gone", "a.html: gone.png"]
    assert broken_links(tmp_path) == broken


def test_links_to_the_repository(tmp_path: Path) -> None:
    """They lead to the page made of a file, or to one that shows it; others are a warning."""
    docs = tmp_path / "docs"
    (docs / "inner").mkdir(parents=True)
    (docs / "conf.py").write_text(
        f"import sys\nsys.path.insert(0, {str(EXTENSIONS)!r})\n"
        'extensions = ["myst_parser", "repository_links"]\nmyst_heading_anchors = 3\n'
    )
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "tool.py").write_text("answer = 42\n")
    (tmp_path / "ARCHITECTURE.md").write_text("# Map\n\n## Words\n\n[tool](code/tool.py)\n")
    (docs / "architecture.md").write_text("```{include} ../ARCHITECTURE.md\n```\n")
    (docs / "index.md").write_text(
        "# Start\n\n[words](../ARCHITECTURE.md#words) [all](../code)\n\n"
        "```{toctree}\narchitecture\ninner/page\n```\n"
    )
    page = docs / "inner" / "page.md"
    page.write_text("# Page\n\n[tool](../../code/tool.py) [start](../index.md)\n")
    out = tmp_path / "out" / "html"
    ran = build(docs, out)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert broken_links(out) == []
    assert "architecture.html#words" in Page(out / "index.html").links
    assert "source/code.html" in Page(out / "index.html").links
    assert "source/code/tool.py.html" in Page(out / "architecture.html").links
    assert "../source/code/tool.py.html" in Page(out / "inner" / "page.html").links
    assert "42" in (out / "source" / "code" / "tool.py.html").read_text()

    for gone in ("../../code/gone.py", "../gone.md", "../index.md#gone"):
        page.write_text(f"# Page\n\n[gone]({gone})\n")
        ran = build(docs, out)
        assert ran.returncode == 1
        assert "page.md:3" in ran.stderr


def test_docstrings_are_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXTENSIONS)
    from docstrings import restructured

    plain = [
        "A sum over K * T slots of `a*b`:",
        "",
        "    y = a * b",
        "",
        "Then *args.",
        "",
        "- one",
        "- two",
    ]
    plain += ["", "Returns:", "    True: it holds."]
    assert list(restructured(plain)) == [
        *("A sum over K \\* T slots of `a*b`:", "", "::", "", "    y = a * b", ""),
        *("Then \\*args.", "", "- one", "- two", "", "Returns:", "    : True: it holds."),
    ]
