"""C++ programs outside the tree, built against the installed package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import torchmoe
from cpp_programs import build, needed_libraries, output_of

pytestmark = pytest.mark.needs_build

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(torchmoe.__file__).resolve().parent
LIBRARY = PACKAGE / "libtorchmoe.so"


@pytest.fixture(scope="module")
def consumers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT / "tests" / "cpp" / "consumer", tmp_path_factory.mktemp("consumers"))


@pytest.mark.slow
def test_ops_are_registered_in_a_program_that_names_no_symbol(consumers: Path) -> None:
    assert "torchmoe::permute(Tensor x" in output_of(consumers / "by_name")
    assert any("libtorchmoe" in name for name in needed_libraries(consumers / "by_name"))


@pytest.mark.slow
def test_the_installed_headers_stand_alone(consumers: Path) -> None:
    assert output_of(consumers / "gradcheck") == "ok\n"


def test_the_library_is_free_of_python() -> None:
    assert not [name for name in needed_libraries(LIBRARY) if "python" in name]
    undefined = output_of("nm", "--dynamic", "--undefined-only", LIBRARY).split()
    assert not [name for name in undefined if re.match(r"_?Py[A-Z_]", name)]


def test_every_installed_header_finds_what_it_includes() -> None:
    include = PACKAGE / "include"
    headers = sorted((include / "torchmoe").rglob("*.h"))
    assert include / "torchmoe" / "testing.h" in headers
    for header in headers:
        for name in re.findall(r'^#include "(.+)"', header.read_text(), re.MULTILINE):
            assert (header.parent / name).is_file(), f"{header} includes {name}"
