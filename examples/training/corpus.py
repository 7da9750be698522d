"""The text: three domains that every machine with Python and torch has, or the user's own.

    python    source of the standard library, without docstrings
    english   those docstrings, and the documentation topics behind Python's help()
    cpp       headers shipped with torch

The split into training and held-out text is by file, by a hash of the file's name: the same on
every machine and for every seed. A file held out of `python` is also held out of `english`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from training import cleaning
from training.cleaning import Document

DOMAIN_BYTES = 3_000_000  # the most text a default domain takes: several default runs' worth
SOURCE_BYTES = 5_000_000  # of the standard library are parsed, which bounds the time to start
USER_BYTES = 64_000_000  # the most text a path of the user's own takes
HELD_OUT_SHARE = 0.1

# Folders of the standard library that are not source a person would read: tests, tables of
# character sets, other people's packages, the topics that `english` takes.
SKIPPED_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data")
)
# Headers that the build of torch writes, one or more per op.
SKIPPED_HEADERS = ("ATen/ops/", "torch/csrc/autograd/generated/", "torch/csrc/lazy/generated/")
# Lines that the build of torch puts around every header.
STABLE_ABI_GUARD = re.compile(
    r"\A#if [^\n]*TORCH_STABLE_ONLY[^\n]*\n"
    r"|#else\n#error [^\n]*TORCH_STABLE_ONLY[^\n]*\n#endif[^\n]*\n*\Z"
)
Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class CorpusError(ValueError):
    """The text cannot be read; the message says why in one line."""


@dataclass(frozen=True)
class Domain:
    """One kind of text."""

    name: str
    train: list[Document]
    held_out: list[Document]


@dataclass(frozen=True)
class Text:
    """What there is to read, as bytes by domain, uint8."""

    domains: list[Domain]
    train: dict[str, Tensor]
    held_out: dict[str, Tensor]

    @classmethod
    def load(cls, paths: list[str]) -> Text:
        """The user's own text, one domain per path, or the default where there is no path."""
        return cls.of(load(paths))

    @classmethod
    def of(cls, domains: list[Domain]) -> Text:
        """The text of these domains."""
        return cls(
            domains,
            {domain.name: as_bytes(domain.train) for domain in domains},
            {domain.name: as_bytes(domain.held_out) for domain in domains},
        )

    def sha256(self) -> str:
        """A hash of every byte, with the domains' names and order and the split."""
        total = hashlib.sha256()
        for name, train in self.train.items():
            for part in (train, self.held_out[name]):
                total.update(f"{name} {len(part)}\n".encode())
                total.update(part.numpy().data)
        return total.hexdigest()

    def describe(self, context: int) -> None:
        """Prints what there is to read, and refuses what is too short to read."""
        width = max(len("domain"), *map(len, self.train))
        print(f"{'domain':{width}s}  train bytes  files  held-out bytes  files")
        for domain in self.domains:
            sizes = len(self.train[domain.name]), len(self.held_out[domain.name])
            if min(sizes) <= context:
                raise CorpusError(
                    f"{domain.name}: --context {context} needs more text than {sizes[0]} bytes to "
                    f"train and {sizes[1]} held out"
                )
            print(
                f"{domain.name:{width}s}  {sizes[0]:11,d}  {len(domain.train):5d}  "
                f"{sizes[1]:14,d}  {len(domain.held_out):5d}"
            )


def as_bytes(documents: Iterable[Document]) -> Tensor:
    """The documents as UTF-8, a blank line between two."""
    data = bytearray("\n\n".join(document.text for document in documents).encode())
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def load(paths: list[str]) -> list[Domain]:
    """The user's own domains, one per path, or the default three where there is no path."""
    if not paths:
        return default_domains()
    names = [Path(path).resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = paths
    if len(set(names)) < len(names):
        raise CorpusError("--data must name each path once, got one twice")
    return [user_domain(name, Path(path)) for name, path in zip(names, paths, strict=True)]


# ---- the default domains


def default_domains() -> list[Domain]:
    """The three domains, with no run of words of any held-out text in any training text."""
    python, english = standard_library()
    sources = {
        "python": python,
        "english": [*documentation_topics(), *english],
        "cpp": torch_headers(),
    }
    split = {name: split_by_name(documents) for name, documents in sources.items()}
    held_out = [document for _, held in split.values() for document in held]
    domains = [
        Domain(name, cleaning.without_overlap(train, held_out), held)
        for name, (train, held) in split.items()
    ]
    for domain in domains:
        if not domain.train or not domain.held_out:
            raise CorpusError(f"this Python installation has no text for {domain.name}: use --data")
    return domains


def standard_library() -> tuple[list[Document], list[Document]]:
    """The library's source without docstrings, and the docstrings."""
    root = Path(sysconfig.get_paths()["stdlib"])
    source, docstrings = [], []
    size = 0
    for name in in_hash_order(python_files(root)):
        text = read_text(root / name)
        if text is None or cleaning.is_generated(text):
            continue
        code, prose = split_docstrings(text)
        code = cleaning.tidy(cleaning.strip_licences(code, cleaning.PYTHON_COMMENTS))
        source.append(Document(name, code))
        docstrings.append(Document(name, prose))
        size += len(code)
        if size > SOURCE_BYTES:
            break
    return list(select(source)), list(select(docstrings))


def python_files(root: Path) -> Iterator[str]:
    """Names of the source files below `root`."""
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        built = name.as_posix().startswith(("config-", "_sysconfigdata"))
        if SKIPPED_FOLDERS.isdisjoint(name.parts[:-1]) and not built:
            yield name.as_posix()


def documentation_topics() -> list[Document]:
    """The chapters that Python's help() shows, from the language reference."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package the documentation apart
        return []
    documents = (Document(f"topics/{name}", cleaning.tidy(topics[name])) for name in topics)
    return list(select(sorted(documents, key=lambda document: hash_of(document.name))))


def torch_headers() -> list[Document]:
    """C++ headers as people wrote them."""
    root = Path(torch.__file__).parent / "include"
    names = (
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.suffix in (".h", ".hpp", ".cuh")
    )

    def documents() -> Iterator[Document]:
        for name in in_hash_order(name for name in names if not name.startswith(SKIPPED_HEADERS)):
            text = read_text(root / name)
            if text is not None and not cleaning.is_generated(text):
                text = STABLE_ABI_GUARD.sub("", text)
                text = cleaning.strip_licences(text, cleaning.CPP_COMMENTS)
                yield Document(name, cleaning.tidy(text))

    return list(select(documents()))


def split_docstrings(source: str) -> tuple[str, str]:
    """The source without its docstrings, and the prose of the docstrings.

    A docstring that shares its line with code stays where it is and gives no prose.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old escapes in string literals
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return "", ""  # some files of the library are wrong on purpose
    lines = source.split("\n")
    prose = []
    for node in definitions(tree):
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        first, last = node.body[0].lineno - 1, (node.body[0].end_lineno or 0) - 1
        opening = lines[first].lstrip()
        quoted = opening.lstrip("rRuU").startswith(('"', "'"))
        if not quoted or not lines[last].rstrip().endswith(('"', "'")):
            continue
        indent = lines[first][: -len(opening)]
        lines[first] = f"{indent}pass" if len(node.body) == 1 and indent else "\0"
        lines[first + 1 : last + 1] = ["\0"] * (last - first)
        if not cleaning.mentions_licence(docstring):
            prose += [p for p in cleaning.paragraphs(docstring) if ">>>" not in p]
    return "\n".join(line for line in lines if line != "\0"), "\n\n".join(prose)


def definitions(node: ast.AST) -> Iterator[Definition]:
    """The module, classes and functions, in the order of the source (ast.walk visits far more)."""
    if isinstance(node, Definition):
        yield node
    for field in ("body", "orelse", "handlers", "finalbody"):
        children = getattr(node, field, ())
        for child in children if isinstance(children, list) else ():
            yield from definitions(child)


def select(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents worth reading, no near-duplicates, up to DOMAIN_BYTES."""
    size = 0
    worthy = (document for document in documents if cleaning.is_worth_reading(document.text))
    for document in cleaning.without_near_duplicates(worthy):
        yield document
        size += len(document.text)
        if size > DOMAIN_BYTES:
            break


def split_by_name(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents: about one name in ten is held out."""
    train: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        is_held_out = hash_of(f"split {document.name}") < HELD_OUT_SHARE * 2**64
        (held_out if is_held_out else train).append(document)
    return train, held_out


def in_hash_order(names: Iterable[str]) -> list[str]:
    """An order that is mixed and yet the same on every machine."""
    return sorted(names, key=hash_of)


def hash_of(name: str) -> int:
    """64 bits that depend on the name only."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


# ---- the user's own text


def user_domain(name: str, path: Path) -> Domain:
    """One file or folder as it is; a single file keeps its last tenth as held-out text."""
    if not path.exists():
        raise CorpusError(f"--data: {path}: no such file or folder")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files.sort(key=lambda file: hash_of(file.relative_to(path).as_posix()))
    documents: list[Document] = []
    seen: set[str] = set()
    room = USER_BYTES
    for file in files:
        text = read_text(file)
        if text and text not in seen and room > 0:
            seen.add(text)
            documents.append(Document(str(file), text[:room]))
            room -= len(text)
    if not documents:
        raise CorpusError(
            f"--data: {path} holds no text (UTF-8 files; empty and binary ones do not count)"
        )
    if len(documents) > 1:
        return Domain(name, *split_by_size(documents))
    whole = documents[0]
    cut = round(len(whole.text) * (1 - HELD_OUT_SHARE))
    first, last = Document(whole.name, whole.text[:cut]), Document(whole.name, whole.text[cut:])
    return Domain(name, [first], [last])


def split_by_size(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Holds out files in order while they fit into a tenth of the text, but one at least."""
    room = HELD_OUT_SHARE * sum(len(document.text) for document in documents)
    held_out = []
    for document in documents:
        if len(document.text) <= room:
            held_out.append(document)
            room -= len(document.text)
    if not held_out:
        held_out = [min(documents, key=lambda document: len(document.text))]
    return [document for document in documents if document not in held_out], held_out


def read_text(path: Path) -> str | None:
    """The file's text with Unix line ends, or None where it is not UTF-8 text."""
    try:
        data = path.read_bytes()
        return None if b"\0" in data else data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from error
