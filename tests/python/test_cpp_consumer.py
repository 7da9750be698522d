"""C++ programs outside the tree, built against the installed package."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

import torchmoe

pytestmark = pytest.mark.needs_build

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(torchmoe.__file__).resolve().parent
LIBRARY = PACKAGE / "libtorchmoe.so"


def output_of(*command: str | Path) -> str:
    """What a command prints; a failing one shows its output in the report."""
    environment = dict(os.environ, OMP_NUM_THREADS="2")
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command[0]} exited with {done.returncode}:\n{done.stdout}"
    return done.stdout


def build(source: Path, folder: Path) -> Path:
    prefix = f"{torchmoe.cmake_prefix_path};{torch.utils.cmake_prefix_path}"
    output_of("cmake", "-S", source, "-B", folder, f"-DCMAKE_PREFIX_PATH={prefix}")
    output_of("cmake", "--build", folder, "--parallel", "2")
    return folder


def needed_libraries(binary: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", output_of("readelf", "-d", binary))


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
