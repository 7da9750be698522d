"""How the documentation site is built: `make docs`, or `sphinx-build docs FOLDER`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.domains.python._object import PyObject
from sphinx.pycode import ModuleAnalyzer
from sphinx.writers.html5 import HTML5Translator

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE / "_extensions"))

project = "torchmoe"
author = "the torchmoe authors"
project_copyright = author
version = release = (ROOT / "VERSION.txt").read_text().strip()

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "breathe",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    # Our own, in _extensions.
    "cpp_headers",
    "docstrings",
    "listed_names",
    "repository_links",
]
exclude_patterns = ["_extensions", "tutorials"]

# ---- Markdown ------------------------------------------------------------------------------------

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
# Links to a heading, as a repository host writes them: page.md#a-heading.
myst_heading_anchors = 4

# ---- The reference -------------------------------------------------------------------------------

nitpicky = True
nitpick_ignore_regex = [
    # Other projects: their inventories would have to be downloaded.
    ("py:.*", r"(torch|collections|contextlib|decimal|fractions|pathlib|typing)\..*"),
    ("py:.*", r"(Figure|GradcheckError|ProcessGroup|Self|Tensor|nn\.Module|os\.\w+)"),
    # What stands in signatures and is of no use by its name.
    ("py:class", r"(torchmoe\.nn\.balance\.)?(Answer|ExpertFunction|Load|Subject)"),
    ("py:class", r"torchmoe\.(.*\._.*|monitor\.watch\.Writer|offload\.layout\.Matrix)"),
    ("cpp:identifier", "ChosenActivation"),
    ("cpp:identifier", r"(at|c10|std|torch)(::.*)?|u?int\d+_t|size_t"),
    # Namespaces, which have no page.
    ("cpp:identifier", r"torchmoe(::nn|::testing)?"),
]
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_class_signature = "mixed"
autosummary_generate = False  # every name stands on a page of the reference
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
cpp_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

breathe_default_project = "torchmoe"
breathe_show_include = False  # the headings say it

# ---- The tutorials -------------------------------------------------------------------------------

sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "tutorial_order.place",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "write_computation_times": False,
    "show_signature": False,
    "reset_modules": (),
}

# ---- The pages -----------------------------------------------------------------------------------

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"torchmoe {version}"
html_favicon = "_static/mark.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# matplotlib's, from a process without a window.
warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")


def _show_inline(translator: HTML5Translator, node: nodes.Element) -> None:
    translator.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def _show_block(translator: HTML5Translator, node: nodes.Element) -> None:
    translator.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def _without_readings(app: Sphinx, module: str) -> tuple[str, dict[str, tuple[str, int, int]]]:
    """A module's source for viewcode, which leads back to one module of the reference alone."""
    analyzer = ModuleAnalyzer.for_module(module)
    analyzer.find_tags()
    own = ("Boundary", "Flips", "Reading")  # other names of their files are torchmoe's
    tags = {name: tag for name, tag in analyzer.tags.items() if name.partition(".")[0] not in own}
    return analyzer.code, tags


def _drop_empty_blocks(app: Sphinx, page: nodes.document) -> None:
    """Takes out what is left of lines that a tutorial does not show."""
    for block in list(page.findall(nodes.literal_block)):
        if not block.astext().strip():
            block.parent.remove(block)


def setup(app: Sphinx) -> None:
    """Leaves formulas to the browser, as MathJax would come from elsewhere; names a section."""
    app.add_html_math_renderer("mathml", (_show_inline, None), (_show_block, None))
    app.connect("doctree-read", _drop_empty_blocks)
    app.connect("viewcode-find-source", _without_readings)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
