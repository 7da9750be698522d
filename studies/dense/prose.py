"""The second text where none is given: what the authors of some Python packages wrote about them.

One kind of text, English with formulas, where the default text of the training program is three
kinds. The packages are those that torch and the training program need.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from training import cleaning, corpus, run_folder
from training.cleaning import Document
from training.corpus import CorpusError, in_hash_order, python_files, read_text, split_docstrings
from training.run_folder import RunFolder

FILE = "prose.txt"
PACKAGES = ("matplotlib", "networkx", "numpy", "scipy", "sympy", "torch")


def write(folder: Path) -> Path:
    """Puts the text into a file of the folder, unless it is there, and gives its path.

    Raises:
        CorpusError: there is not enough of it.
        FolderError: it cannot be written.
    """
    path = folder / FILE
    if not path.exists():
        text = with_held_out_tenth(list(corpus.select(docstrings())))
        try:
            run_folder.write(path, [text.encode()])
        except OSError as error:
            raise RunFolder(folder).unwritable(error) from error
    return path


def docstrings() -> Iterator[Document]:
    """The docstrings of each module, the modules of all packages in a mixed order."""
    roots = {name: root for name in PACKAGES if (root := root_of(name)) is not None}
    names = [f"{name}/{file}" for name, root in roots.items() for file in python_files(root)]
    for name in in_hash_order(names):
        package, _, file = name.partition("/")
        source = read_text(roots[package] / file)
        if source is not None and not cleaning.is_generated(source):
            yield Document(name, cleaning.tidy(split_docstrings(source)[1]))


def root_of(package: str) -> Path | None:
    """The folder of a package, None where it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0])


def with_held_out_tenth(documents: list[Document]) -> str:
    """One text whose last tenth, which the training program holds out, shares no run of words.

    Raises:
        CorpusError: there are not two documents.
    """
    if len(documents) < 2:
        raise CorpusError("the installed packages hold too little text: use --second-data")
    train, held_out = corpus.split_by_size(documents)
    train = cleaning.without_overlap(train, held_out)
    read, unseen = ("\n\n".join(document.text for document in some) for some in (train, held_out))
    tenth = min(len(unseen), len(read) // 9)
    return read[: 9 * tenth] + unseen[:tenth]
