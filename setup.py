"""Drives CMake, which holds the build: one list of sources, one set of flags.

Everything else about the package is in pyproject.toml, but what depends on the torch at hand.

These variables of the environment are read: MAX_JOBS (compilers at once), CMAKE_ARGS (further
arguments of CMake), TORCHMOE_CUDA (ON or OFF).
"""

import importlib.metadata
import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# 77 is the first that reads the licence as pyproject.toml has it.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"torchmoe: setuptools must be 77 or later, got {setuptools.__version__}: "
        "pip install torch 'setuptools>=77' cmake ninja"
    )
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent.resolve()
BUILD = ROOT / "build"


def torch_folder() -> Path:
    """Where torch is; it is not imported, which may need more than is needed here."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "torchmoe: building needs torch in this environment: pip install torch first, "
            "then pip install --no-build-isolation ."
        )
    return Path(spec.origin).parent


def torch_minor() -> str:
    """The release of torch at hand without its patch number, such as 2.13."""
    return ".".join(importlib.metadata.version("torch").split(".")[:2])


class PurePart(build_py):
    """Copies the Python files."""

    def run(self) -> None:
        """Leaves nothing of an earlier build, whose modules may be gone."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "torchmoe", ignore_errors=True)
        super().run()


class Wheel(bdist_wheel):
    """A wheel for every Python: the library calls nothing of CPython's."""

    def get_tag(self) -> tuple[str, str, str]:
        """Says so, and for which system."""
        return "py3", "none", super().get_tag()[2]


class CMakeBuild(build_ext):
    """Configures, builds and installs the CMake project into the package's folder."""

    def run(self) -> None:
        """Installs next to the Python files: those of the source tree for an editable install."""
        in_place = self.inplace or self.editable_mode
        package = (ROOT / "python" if in_place else Path(self.build_lib).resolve()) / "torchmoe"
        torch_cmake = torch_folder() / "share" / "cmake"
        jobs = (
            self.parallel or runpy.run_path(str(ROOT / "cmake" / "build_jobs.py"))["build_jobs"]()
        )
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{BUILD}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_PREFIX_PATH={torch_cmake}",
            "-DTORCHMOE_BUILD_PYTHON=ON",
            # The wheel's layout: libraries next to the Python files, where the loader looks.
            "-DCMAKE_INSTALL_LIBDIR=.",
            "-DCMAKE_INSTALL_INCLUDEDIR=include",
            "-UTORCHMOE_CUDA",  # of the last time
        ]
        if "TORCHMOE_CUDA" in os.environ:
            configure.append(f"-DTORCHMOE_CUDA={os.environ['TORCHMOE_CUDA']}")
        cache = BUILD / "CMakeCache.txt"
        known = cache.exists()
        if known and not remembers(cache, torch_cmake / "Torch"):
            configure.append("--fresh")
            known = False
        if not known and shutil.which("ninja"):
            configure.append("-GNinja")
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(configure, check=True)
        build = ["cmake", "--build", BUILD, "--target", "torchmoe", "-j", str(jobs)]
        subprocess.run(build, check=True)
        for installed in ("include", "share"):  # what has been deleted since
            shutil.rmtree(package / installed, ignore_errors=True)
        subprocess.run(["cmake", "--install", BUILD, "--prefix", package, "--strip"], check=True)

    def get_outputs(self) -> list[str]:
        """CMake knows what it installed; setuptools need not."""
        return []


def remembers(cache: Path, torch: Path) -> bool:
    """Whether a CMake cache is of this folder, this torch and programs that are still there."""
    lines = [line.split("=", 1) for line in cache.read_text().splitlines() if "=" in line]
    entries = {name.split(":")[0]: value for name, value in lines}
    return (
        entries.get("CMAKE_HOME_DIRECTORY") == str(ROOT)
        and entries.get("Torch_DIR") == str(torch)
        and shutil.which(entries.get("CMAKE_MAKE_PROGRAM", "")) is not None
    )


VERSION = (ROOT / "VERSION.txt").read_text().strip()
REQUIREMENTS = {"version": VERSION, "install_requires": ["torch>=2.11"]}
if "sdist" not in sys.argv and importlib.util.find_spec("torch") is not None:
    # What is compiled runs with the minor release of torch that it was compiled for.
    REQUIREMENTS = {
        "version": f"{VERSION}+torch{torch_minor()}",
        "install_requires": [f"torch=={torch_minor()}.*"],
    }

setup(
    **REQUIREMENTS,
    ext_modules=[Extension("torchmoe.libtorchmoe", sources=[])],
    cmdclass={"bdist_wheel": Wheel, "build_ext": CMakeBuild, "build_py": PurePart},
)
