"""How the package is built: what setup.py tells CMake, and which torch CMake finds."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.needs_build

ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent
# What a stub in CMake's place writes down of each call, and the cache that it leaves.
CMAKE = """\
#!{python}
import json, os, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
build = [argument[2:] for argument in sys.argv if argument.startswith("-B")]
if build:
    os.makedirs(build[0], exist_ok=True)
    source = [argument[2:] for argument in sys.argv if argument.startswith("-S")][0]
    with open(build[0] + "/CMakeCache.txt", "w") as cache:
        cache.write(f"CMAKE_HOME_DIRECTORY:INTERNAL={{source}}\\n")
        cache.write("Torch_DIR:PATH={torch}/share/cmake/Torch\\n")
        cache.write("CMAKE_MAKE_PROGRAM:FILEPATH={tools}/ninja\\n")
"""


class Checkout:
    """As much of the sources as setup.py reads, and a CMake that only writes down its calls."""

    def __init__(self, folder: Path, tools: Path) -> None:
        """Makes it in `folder`, the stubs in `tools`."""
        self.folder, self.tools, self.log = folder, tools, tools / "calls"
        (folder / "python" / "torchmoe").mkdir(parents=True)
        (folder / "cmake").mkdir()
        for name in ("setup.py", "pyproject.toml", "VERSION.txt", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        shutil.copy(ROOT / "cmake" / "build_jobs.py", folder / "cmake")
        (folder / "python" / "torchmoe" / "__init__.py").touch()
        tools.mkdir()
        for name in ("cmake", "ninja"):
            stub = tools / name
            stub.write_text(
                CMAKE.format(python=sys.executable, log=str(self.log), torch=TORCH, tools=tools)
            )
            stub.chmod(0o755)

    def build(self, *command: str, **environment: str) -> list[list[str]]:
        """The calls of CMake in a build, each a list of arguments."""
        self.log.unlink(missing_ok=True)
        kept = {name: os.environ[name] for name in os.environ.keys() - {"CMAKE_ARGS", "MAX_JOBS"}}
        subprocess.run(
            [sys.executable, "setup.py", "--quiet", *(command or ("build_ext", "--inplace"))],
            cwd=self.folder,
            env={**kept, "PATH": f"{self.tools}:{os.environ['PATH']}", **environment},
            check=True,
        )
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "check out", tmp_path / "tools")


def test_what_cmake_is_told(checkout: Checkout) -> None:
    configure, build, install = checkout.build()
    assert "-GNinja" in configure
    assert f"-DCMAKE_PREFIX_PATH={TORCH / 'share' / 'cmake'}" in configure
    assert "--fresh" not in configure
    assert not [argument for argument in configure if argument.startswith("-DTORCHMOE_CUDA")]
    assert build[build.index("--target") + 1] == "torchmoe"
    assert install[install.index("--prefix") + 1] == f"{checkout.folder}/python/torchmoe"


def test_what_the_environment_says(checkout: Checkout) -> None:
    configure, build, _ = checkout.build(
        CMAKE_ARGS="-DONE=1 '-DTWO=a b'", TORCHMOE_CUDA="OFF", MAX_JOBS="7"
    )
    assert configure[-2:] == ["-DONE=1", "-DTWO=a b"]
    assert "-DTORCHMOE_CUDA=OFF" in configure
    assert build[-2:] == ["-j", "7"]


def test_a_build_folder_is_used_again(checkout: Checkout) -> None:
    checkout.build()
    configure, *_ = checkout.build()
    assert "--fresh" not in configure
    assert "-GNinja" not in configure  # CMake knows


@pytest.mark.parametrize("change", ["moved", "other torch", "no ninja"])
def test_a_build_folder_of_something_else_is_made_afresh(checkout: Checkout, change: str) -> None:
    checkout.build()
    if change == "moved":
        checkout.folder = checkout.folder.rename(checkout.folder.with_name("moved"))
    cache = checkout.folder / "build" / "CMakeCache.txt"
    if change == "other torch":
        cache.write_text(cache.read_text().replace(str(TORCH), "/elsewhere/torch"))
    if change == "no ninja":
        cache.write_text(cache.read_text().replace("tools/ninja", "tools/gone"))
    configure, *_ = checkout.build()
    assert "--fresh" in configure
    assert "-GNinja" in configure


def test_what_was_deleted_is_not_in_the_next_wheel(checkout: Checkout) -> None:
    package = checkout.folder / "python" / "torchmoe"
    (package / "gone.py").touch()
    (package / "part").mkdir()
    (package / "part" / "__init__.py").touch()
    checkout.build("build", "--build-lib", "lib")
    header = checkout.folder / "lib" / "torchmoe" / "include" / "gone.h"
    header.parent.mkdir()
    header.touch()
    (package / "gone.py").unlink()
    shutil.rmtree(package / "part")
    checkout.build("build", "--build-lib", "lib")
    files = {path.name for path in (checkout.folder / "lib").rglob("*") if path.is_file()}
    assert files == {"__init__.py"}


def test_old_setuptools_are_refused_in_a_line(checkout: Checkout) -> None:
    (checkout.tools / "sitecustomize.py").write_text(
        "import setuptools; setuptools.__version__ = '65.5.0'\n"
    )
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=checkout.folder,
        env={**os.environ, "PYTHONPATH": str(checkout.tools)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "torchmoe: setuptools must be 77 or later, got 65.5.0: "
        "pip install torch 'setuptools>=77' cmake ninja\n"
    )


# ---- compilers at once


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.delenv("MAX_JOBS", raising=False)

    def jobs(**globals_: Any) -> int:
        module = runpy.run_path(str(ROOT / "cmake" / "build_jobs.py"))
        module["build_jobs"].__globals__.update(globals_)
        return int(module["build_jobs"]())

    return jobs


def test_jobs_follow_the_cores_that_may_be_used(
    jobs: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 8})
    assert jobs(available_bytes=lambda: 1e12) == 3


def test_jobs_follow_the_memory(
    jobs: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert jobs(available_bytes=lambda: 5.9e9) == 5
    assert jobs(available_bytes=lambda: 1e8) == 1
    limit = tmp_path / "memory.max"
    limit.write_text("2500000000\n")
    assert 1 <= jobs(LIMITS=(limit,)) <= 2
    limit.write_text("max\n")
    assert jobs(LIMITS=(limit,)) >= 1


def test_jobs_that_are_asked_for(jobs: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "11")
    assert jobs(available_bytes=lambda: 1e8) == 11


# ---- which torch, and whether with CUDA


def configured(
    folder: Path, *arguments: str, status: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """CMake's configuration of the sources in a new folder."""
    kept = {name: os.environ[name] for name in os.environ.keys() - {"TORCHMOE_CUDA"}}
    done = subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(folder), *arguments],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture
def cuda_torch(tmp_path: Path) -> str:
    """The folder of CMake files of this torch, as a CUDA build of it would look."""
    fake = tmp_path / "torch"
    (fake / "lib").mkdir(parents=True)
    (fake / "share").symlink_to(TORCH / "share")
    (fake / "include").symlink_to(TORCH / "include")
    for library in (TORCH / "lib").iterdir():
        (fake / "lib" / library.name).symlink_to(library)
    (fake / "lib" / "libtorch_cuda.so").touch()
    return str(fake / "share" / "cmake")


NO_TOOLKIT = "-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON"


def test_a_cuda_build_of_torch_without_the_toolkit(cuda_torch: str, tmp_path: Path) -> None:
    done = configured(tmp_path / "build", f"-DCMAKE_PREFIX_PATH={cuda_torch}", NO_TOOLKIT)
    assert "torchmoe: without CUDA, since there is no CUDA toolkit" in done.stdout
    cache = (tmp_path / "build" / "CMakeCache.txt").read_text()
    assert "TORCHMOE_CUDA:BOOL=OFF" in cache


def test_cuda_that_is_asked_for_and_cannot_be_had(cuda_torch: str, tmp_path: Path) -> None:
    prefix = f"-DCMAKE_PREFIX_PATH={cuda_torch}"
    done = configured(tmp_path / "a", prefix, NO_TOOLKIT, status=1, TORCHMOE_CUDA="ON")
    error = " ".join(done.stderr.split())
    assert (
        "torchmoe: TORCHMOE_CUDA must be OFF here, since there is no CUDA toolkit; got ON" in error
    )


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA")
def test_cuda_with_a_torch_that_has_none(tmp_path: Path) -> None:
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    done = configured(tmp_path / "b", prefix, "-DTORCHMOE_CUDA=ON", status=1)
    error = " ".join(done.stderr.split())
    assert "must be OFF here, since torch is a build without CUDA; got ON" in error


def test_without_torch(tmp_path: Path) -> None:
    done = configured(tmp_path / "build", "-DCMAKE_PREFIX_PATH=/nowhere", status=1)
    error = " ".join(done.stderr.split())
    assert 'torchmoe: CMAKE_PREFIX_PATH must lead to torch, got "/nowhere"' in error
    assert "python -c 'import torch; print(torch.utils.cmake_prefix_path)'" in error


# ---- whose revision


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize("vendored", [False, True])
def test_the_revision_is_that_of_these_sources(tmp_path: Path, vendored: bool) -> None:
    source = tmp_path / "third_party" / "torchmoe" if vendored else tmp_path
    source.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "cmake" / "revision.cmake", source)
    script = source / "show.cmake"
    script.write_text('include(revision.cmake)\nmessage("<${TORCHMOE_GIT_REVISION}>")\n')
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "everything")
    done = subprocess.run(
        ["cmake", f"-DPROJECT_SOURCE_DIR={source}", "-P", str(script)],
        cwd=source,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stderr.strip() == "<unknown>") == vendored
