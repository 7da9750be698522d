"""The wheel and the source archive, installed as a user installs them."""

from __future__ import annotations

import re
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

import torchmoe
from wheels import ROOT, make_wheel, one_at_a_time, pip, run

pytestmark = [pytest.mark.needs_build, pytest.mark.slow]

PACKAGE = Path(torchmoe.__file__).resolve().parent
VERSION = (ROOT / "VERSION.txt").read_text().strip()
TORCH = ".".join(torch.__version__.split(".")[:2])
#: Of the suite: the loading of the package, and an op with all that its harness asks.
SOME_TESTS = ("tests/python/test_package.py", "tests/python/ops/test_scale_gradient.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """The Python of an environment with torch and pytest, and nothing of this project."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for part in Path(sysconfig.get_path("purelib")).iterdir():
        if "torchmoe" not in part.name and part.suffix != ".pth":
            (site / part.name).symlink_to(part)
    assert "No module named 'torchmoe'" in run(python, "-c", "import torchmoe", status=1)
    return python


def test_what_the_wheel_says_of_itself(wheel: Path) -> None:
    assert re.fullmatch(
        rf"torchmoe-{re.escape(VERSION)}\+torch{TORCH}-py3-none-linux_\w+\.whl", wheel.name
    )
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        text = archive.read(metadata).decode()
    assert f"\nRequires-Dist: torch=={TORCH}.*\n" in text
    assert "\nLicense-Expression: BSD-3-Clause\n" in text
    for name in ("libtorchmoe.so", "_build.py", "py.typed", "include/torchmoe/torchmoe.h"):
        assert f"torchmoe/{name}" in names
    assert "torchmoe/share/cmake/torchmoe/torchmoeConfig.cmake" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"torchmoe"}
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    assert {name[len("torchmoe/") :] for name in names if name.endswith(".py")} == modules


def test_installs_without_a_compiler_and_runs(wheel: Path, clean: Path) -> None:
    pip(clean, "install", wheel, PATH="")
    assert "torchmoe" not in pip(clean, "check", status=None)
    assert str(clean.parents[1]) in run(clean, "-m", "torchmoe", PATH="")
    output = run(clean, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SOME_TESTS)
    assert re.search(r"\d{2,} passed", output)


@pytest.mark.parametrize("other", ["2.10.0", "2.99.0", "1.13.1"])
def test_pip_refuses_the_wheel_of_another_torch(wheel: Path, clean: Path, other: str) -> None:
    (entry,) = (clean.parents[1] / "lib").glob("python*/site-packages/torch-*.dist-info")
    entry.unlink()
    entry = entry.with_name(f"torch-{other}.dist-info")
    entry.mkdir()
    (entry / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {other}\n")
    message = pip(clean, "install", wheel, status=1)
    assert f"No matching distribution found for torch=={TORCH}.*" in message
    pip(clean, "install", "--no-deps", wheel)
    complaints = pip(clean, "check", status=1)
    assert f"torchmoe {VERSION}+torch{TORCH} has requirement torch=={TORCH}.*" in complaints


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    with one_at_a_time():
        run(sys.executable, "-m", "build", "--sdist", "--no-isolation", f"--outdir={folder}", ROOT)
    (file,) = folder.iterdir()
    return file


def test_the_source_archive_has_every_source(archive: Path) -> None:
    assert archive.name == f"torchmoe-{VERSION}.tar.gz"
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        metadata = tar.extractfile(f"torchmoe-{VERSION}/PKG-INFO")
        assert metadata is not None
        assert "\nRequires-Dist: torch>=2.11\n" in metadata.read().decode()
    generated = {"__pycache__", "include", "share", "_build.py"}
    wanted = {
        str(path.relative_to(ROOT))
        for folder in (
            "csrc",
            "cmake",
            "docs",
            "examples",
            "studies",
            "benchmarks",
            "tests",
            "python/torchmoe",
        )
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".so" and not generated.intersection(path.parts)
    }
    for name in ("CMakeLists.txt", "VERSION.txt", "Makefile", "LICENSE", ".ci/run"):
        assert name in names
    assert sorted(wanted - names) == []
    built = [name for name in names if generated.intersection(name.split("/"))]
    assert built + [name for name in names if name.endswith(".so")] == []


@pytest.mark.release
def test_the_source_archive_installs(archive: Path, clean: Path) -> None:
    # As quickly as it compiles: nothing is optimised.
    flags = "-DCMAKE_CXX_FLAGS_RELEASE= -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON"
    unity = "-DCMAKE_UNITY_BUILD=ON -DCMAKE_UNITY_BUILD_BATCH_SIZE=12"
    pip(clean, "install", "--no-build-isolation", archive, CMAKE_ARGS=f"{flags} {unity}")
    code = "import torch, torchmoe; print(torchmoe.nn.MoE(8, 8, 4, 2)(torch.ones(3, 8)).aux_loss)"
    assert run(clean, "-c", code).startswith("tensor(")
    assert "git revision unknown" in run(clean, "-m", "torchmoe")
