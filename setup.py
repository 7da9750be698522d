"""Drives CMake, which holds the build: one list of sources, one set of flags.

Everything else about the package is in pyproject.toml.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configures, builds and installs the CMake project into the package's folder."""

    def run(self) -> None:
        """Installs beside the Python files: those of the source tree for an editable install."""
        try:
            import torch
        except ImportError as error:
            raise SystemExit(
                "torchmoe: building needs torch in this environment: pip install torch first, "
                "then pip install --no-build-isolation ."
            ) from error
        in_place = self.inplace or self.editable_mode
        package = (ROOT / "python" if in_place else Path(self.build_lib).resolve()) / "torchmoe"
        build = ROOT / "build"
        jobs = str(self.parallel or os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        torch_cmake = torch.utils.cmake_prefix_path
        cache = build / "CMakeCache.txt"
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_PREFIX_PATH={torch_cmake}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DTORCHMOE_BUILD_PYTHON=ON",
            # The wheel's layout: libraries beside the Python files, where the loader looks.
            "-DCMAKE_INSTALL_LIBDIR=.",
            "-DCMAKE_INSTALL_INCLUDEDIR=include",
        ]
        if cache.exists() and f"Torch_DIR:PATH={torch_cmake}/Torch\n" not in cache.read_text():
            configure.append("--fresh")  # it remembers the libraries of another environment's torch
        if shutil.which("ninja") and not cache.exists():
            configure.append("-GNinja")
        subprocess.run(configure, check=True)
        subprocess.run(
            ["cmake", "--build", build, "--target", "torchmoe", "_C", "-j", jobs], check=True
        )
        subprocess.run(["cmake", "--install", build, "--prefix", package, "--strip"], check=True)

    def get_outputs(self) -> list[str]:
        """CMake knows what it installed; setuptools need not."""
        return []


setup(
    version=(ROOT / "VERSION.txt").read_text().strip(),
    ext_modules=[Extension("torchmoe._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
