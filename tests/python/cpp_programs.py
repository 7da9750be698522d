"""C++ programs outside the tree, built against an installed package."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import torch

import torchmoe


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


def build(
    source: Path, folder: Path, *arguments: str, package: str = torchmoe.cmake_prefix_path
) -> Path:
    """The folder with the programs of a CMake project.

    Args:
        source: where its CMakeLists.txt is.
        folder: where it is built.
        arguments: further ones of CMake.
        package: leads to torchmoe.
    """
    prefix = f"-DCMAKE_PREFIX_PATH={package};{torch.utils.cmake_prefix_path}"
    output_of("cmake", "-S", source, "-B", folder, prefix, *arguments)
    output_of("cmake", "--build", folder, "--parallel", "2")
    return folder


def needed_libraries(binary: Path) -> list[str]:
    """What the loader loads with a program or a library."""
    return re.findall(r"\(NEEDED\).*\[(.+)\]", output_of("readelf", "-d", binary))
