"""The patches of tests/additions apply, touch few files, and those that CONTRIBUTING lists."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from count_additions import HERE, KINDS, ROOT, Kind, files_of, git, listed
from cpp_functions import read, wide_functions

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def test_every_patch_is_of_a_kind() -> None:
    assert {path.stem for path in HERE.glob("*.patch")} == set(KINDS)


@every_kind
def test_it_applies(kind: Kind, tmp_path: Path) -> None:
    """To a copy of the files it touches, as they are now, and to all of them."""
    files = files_of(kind.patch)
    for name in files:
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    before = {name: (tmp_path / name).is_file() for name in files}
    git("apply", "--whitespace=error-all", str(kind.patch), folder=tmp_path)
    for name in files:
        changed = (tmp_path / name).read_text()
        assert not before[name] or changed != (ROOT / name).read_text(), name


@every_kind
def test_it_touches_few_files_and_those_that_contributing_lists(kind: Kind) -> None:
    files = files_of(kind.patch)
    assert len(files) <= kind.limit
    assert sorted(name.replace(kind.example, "X") for name in files) == listed(kind)


def test_contributing_refers_to_every_kind() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for kind in KINDS.values():
        assert text.count(f"\n## {kind.heading}\n") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int f(); int g(void); int h(int);", {"f": 0, "g": 0, "h": 1}),
        ("int f(std::map<int, std::pair<int, int>> a, int b = g(1, 2));", {"f": 2}),
        ("void f(int (*g)(int, int), std::array<int, 2> a = {1, 2}, /* b, c */ int d);", {"f": 3}),
        ("void f(const char* a = \"x, y // z\", char b = ',', int c = 1'000);", {"f": 3}),
        (
            "template <typename T, int N> __global__ void f(T* a, T* __restrict__ b) { g(a, b); }",
            {"f": 2},
        ),
        ("namespace a::b { namespace { inline int f(int x) { return g(x, x); } } }", {"f": 1}),
        (
            "class A : B<int, int> { A(int a, int b) : a_{a}, b_(b) { run(a, b); } int f(int); };",
            {"A::A": 2, "A::f": 1},
        ),
        ("int A::f(int a, int b) const { return a < b; }", {"A::f": 2}),
        (
            "struct A { bool operator()(int a, int b); A& operator=(A a); int x = f(1, 2); };",
            {"A::operator()": 2, "A::operator=": 1},
        ),
        ('TEST_CASE("a, b") { f(1, 2); } int g(int a);', {"g": 1}),
        ("#define F(a, b) \\\n  f(a, b)\nusing G = int(int, int);\nint h(int a);", {"h": 1}),
        ("const int x = f(1, 2);\nint g(int a);", {"g": 1}),
        ("template <typename T> requires is_int<T> void f(T&& b, auto... rest);", {"f": 2}),
        ("int f(int a, int b) noexcept(true) { }\nint f(int a);", {"f": 2}),
    ],
)
def test_parameters_are_counted(text: str, expected: dict[str, int]) -> None:
    found: dict[str, int] = {}
    for name, parameters in read(text).functions:
        found[name] = max(len(parameters), found.get(name, 0))
    assert found == expected


def test_a_large_record_counts_as_its_fields(tmp_path: Path) -> None:
    fields = "int a, b; std::vector<int> c = {1, 2}; " + "".join(f"float* f{i};" for i in range(8))
    source = f"struct Large {{ {fields} void run(int); static int count; }};\n"
    source += f"struct Small {{ {fields.replace('int a, b;', 'int a;')} }};\n"
    source += "void f(const Large& x); void g(Small& x, int y); void h(const ns::Large* x, int y);"
    (tmp_path / "a.h").write_text(source)
    assert wide_functions(tmp_path, more_than=8) == {"f": (11, "a.h"), "h": (12, "a.h")}
