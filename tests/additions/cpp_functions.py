"""C++ functions by how many parameters they have, read from the sources without a compiler.

A function counts once, by its name and that of its class, with the most parameters that one of its
declarations has. A parameter whose type is a struct of more than 10 fields counts as those fields:
a record does not make many arguments few.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FIELDS_THAT_COUNT_AS_ONE = 10
SUFFIXES = (".h", ".cpp", ".cu")

# Numbers and strings first, in which a quote or two slashes begin nothing.
_KEPT = r"\b\d[\w.']*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'"
_SILENT = re.compile(
    r'R"(?P<mark>[^(\s]*)\(.*?\)(?P=mark)"'
    rf"|(?P<kept>{_KEPT})"
    r"|//[^\n]*|/\*.*?\*/"  # comments
    r"|^[ \t]*#(?:[^\n\\]|\\.|\\\n)*",  # directives, macros of several lines included
    re.DOTALL | re.MULTILINE,
)
_TOKEN = re.compile(rf"{_KEPT}|~?[A-Za-z_]\w*|::|->|\.\.\.|\S")
_OPENS, _CLOSES = "([{", ")]}"
# Words before a parenthesis that make it no list of parameters.
_NO_FUNCTION = {
    "alignas", "decltype", "defined", "explicit", "if", "noexcept", "requires", "sizeof",
    "static_assert", "switch", "while", "for", "return", "__launch_bounds__", "__attribute__",
}  # fmt: skip


@dataclass
class Source:
    """What one file declares."""

    functions: list[tuple[str, list[list[str]]]] = field(default_factory=list)
    fields: dict[str, int] = field(default_factory=dict)  # of structs and classes


def tokens_of(text: str) -> list[str]:
    """The words and signs, without comments, directives and raw strings."""
    return _TOKEN.findall(_SILENT.sub(lambda found: found["kept"] or " ", text))


def closing(tokens: list[str], start: int) -> int:
    """The place of the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(tokens)):
        depth += (tokens[place] in _OPENS) - (tokens[place] in _CLOSES)
        if depth == 0:
            return place
    raise ValueError(f"a {tokens[start]} is never closed")


def closing_angle(tokens: list[str], start: int) -> int:
    """The same for a `<` of a template."""
    depth, place = 0, start
    while place < len(tokens):
        if tokens[place] in _OPENS:
            place = closing(tokens, place)
        else:
            depth += (tokens[place] == "<") - (tokens[place] == ">")
            if depth == 0:
                return place
        place += 1
    raise ValueError("a < is never closed")


def split(tokens: list[str]) -> list[list[str]]:
    """What stands between the commas that no bracket holds."""
    parts: list[list[str]] = [[]]
    place = 0
    while place < len(tokens):
        token = tokens[place]
        end = place
        if token in _OPENS:
            end = closing(tokens, place)
        elif token == "<" and place and re.fullmatch(r"\w+", tokens[place - 1]):
            end = closing_angle(tokens, place)
        if token == ",":
            parts.append([])
        else:
            parts[-1] += tokens[place : end + 1]
        place = end + 1
    return [] if parts in ([[]], [["void"]]) else parts


def read(text: str) -> Source:
    """The functions and structs that a source declares."""
    source = Source()
    _declarations(tokens_of(text), (), source)
    return source


def _declarations(tokens: list[str], within: tuple[str, ...], source: Source) -> int:
    """Reads a scope of declarations; returns how many fields it has."""
    fields, place, start = 0, 0, 0
    while place < len(tokens):
        head = tokens[start:place]
        token = tokens[place]
        if token == ";" or (token == ":" and head in (["public"], ["private"], ["protected"])):
            fields += _fields(head) if token == ";" else 0
            start = place + 1
        elif "operator" in head[-1:] and not re.fullmatch(r"\w+", token):
            # The signs of its name, of which () are two.
            place = closing(tokens, place) if token in _OPENS else place
            while tokens[place + 1] != "(":
                place += 1
        elif token == "<" and head and re.fullmatch(r"\w+", head[-1]):
            place = closing_angle(tokens, place)
        elif token == "=":
            place = _end_of_statement(tokens, place) - 1  # a default, or what it begins as
        elif token in "([":
            end = closing(tokens, place)
            if token == "(" and _is_function(head, within):
                name = "::".join((*within[-1:], *_name(head)))
                source.functions.append((name, split(tokens[place + 1 : end])))
                end = _end_of_function(tokens, end + 1)
                start = end + 1
            elif token == "(" and _is_macro(head, within):
                end = _end_of_function(tokens, end + 1)
                fields += head == ["TORCH_ARG"]
                start = end + 1
            place = end
        elif token == "{":
            end = closing(tokens, place)
            inside = tokens[place + 1 : end]
            kind = _scope(head)
            if kind == "namespace":
                _declarations(inside, within, source)
                start = end + 1
            elif kind:
                count = _declarations(inside, (*within, kind), source)
                source.fields[kind] = max(count, source.fields.get(kind, 0))
            place = end
        place += 1
    return fields


def _is_macro(head: list[str], within: tuple[str, ...]) -> bool:
    """Whether a macro stands for the declaration: of a field, a registration or a test."""
    return len(head) == 1 and head[0].isupper() and head[0] not in within


def _is_function(head: list[str], within: tuple[str, ...]) -> bool:
    """Whether a parenthesis after these words of a declaration holds parameters."""
    if not head or head[0] in ("using", "typedef", "friend", "static_assert", "extern"):
        return False
    if "operator" in head:
        return True
    is_name = re.fullmatch(r"~?[A-Za-z_]\w*", head[-1])
    return bool(is_name) and head[-1] not in _NO_FUNCTION and not _is_macro(head, within)


def _name(head: list[str]) -> tuple[str, ...]:
    """The function's name, with its class's where it is defined outside of that."""
    if "operator" in head:
        return ("".join(head[head.index("operator") :]),)
    if len(head) > 2 and head[-2] == "::" and re.fullmatch(r"[A-Z]\w*", head[-3]):
        return head[-3], head[-1]
    return (head[-1],)


def _scope(head: list[str]) -> str | None:
    """The class that a brace opens, or "namespace"; None if it opens something else."""
    if "namespace" in head or head[:1] == ["extern"]:
        return "namespace"
    for word in ("struct", "class"):
        if word in head and "enum" not in head:
            rest = _without_template(head)
            if word in rest:
                named = [
                    t for t in rest[rest.index(word) + 1 :] if re.fullmatch(r"[A-Za-z_]\w*", t)
                ]
                return named[0] if named else "unnamed"
    return None


def _without_template(head: list[str]) -> list[str]:
    """A declaration's words after its template<...>."""
    while head[:1] == ["template"]:
        head = head[closing_angle(head, 1) + 1 :]
    return head


def _end_of_statement(tokens: list[str], place: int) -> int:
    """The place of the semicolon that ends what stands here."""
    while place < len(tokens) and tokens[place] != ";":
        place = closing(tokens, place) + 1 if tokens[place] in _OPENS else place + 1
    return place


def _end_of_function(tokens: list[str], place: int) -> int:
    """The last token of a function of which the parameters end before this place."""
    initialises = False
    while place < len(tokens):
        token = tokens[place]
        if token == ";":
            return place
        if token == ":":
            initialises = True
        if token == "{":
            end = closing(tokens, place)
            # a{1}, b{2} of a constructor, and then its body
            if not (initialises and re.fullmatch(r"\w+|>", tokens[place - 1])):
                return end
            place = end
        elif token in _OPENS:
            place = closing(tokens, place)
        place += 1
    return place


def _fields(head: list[str]) -> int:
    """How many fields a declaration of a struct gives it."""
    head = _without_template(head)
    if len(head) < 2 or {"using", "typedef", "friend", "static", "operator"} & {*head[:2]}:
        return 0
    if head[0] in ("struct", "class", "enum"):
        return 0  # a declaration alone, or a type
    return len(split(head))


def wide_functions(folder: Path, more_than: int) -> dict[str, tuple[int, str]]:
    """The functions of more parameters: name -> their number, and a file that declares it."""
    sources = {
        str(path.relative_to(folder)): read(path.read_text())
        for path in sorted(folder.rglob("*"))
        if path.suffix in SUFFIXES
    }
    fields: dict[str, int] = {}
    for source in sources.values():
        for name, count in source.fields.items():
            fields[name] = max(count, fields.get(name, 0))
    found: dict[str, tuple[int, str]] = {}
    for path, source in sources.items():
        for name, parameters in source.functions:
            count = sum(_weights(parameters, fields))
            if count > max(more_than, found.get(name, (0, ""))[0]):
                found[name] = count, path
    return found


def _weights(parameters: list[list[str]], fields: dict[str, int]) -> Iterator[int]:
    """What each parameter counts."""
    for parameter in parameters:
        declared = parameter[: parameter.index("=")] if "=" in parameter else parameter
        words = [t for t in declared if re.fullmatch(r"[A-Za-z_]\w*", t) and t != "const"]
        kinds = words[:-1] if len(words) > 1 else words  # the last is the parameter's name
        largest = max((fields.get(word, 0) for word in kinds), default=0)
        yield largest if largest > FIELDS_THAT_COUNT_AS_ONE else 1
