"""Loads the ops, or says in one sentence why it cannot.

Three files that the build puts next to this one are read: `_build.py` (which torch it was built
for), `libtorchmoe.so` (the ops) and the extension module `_C` (build information). The torch
version is compared before either binary is touched: a library built for another minor version of
torch fails with undefined symbols or worse.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch

PACKAGE = Path(__file__).absolute().parent
LIBRARY = PACKAGE / "libtorchmoe.so"
BUILD_COMMAND = "pip install --no-build-isolation ."


def _minor(version: str) -> str:
    """The part of a torch version that its binary interface depends on: "2.13" of "2.13.0+cpu"."""
    return ".".join(version.split(".")[:2])


def _error(reason: str, *, built_for: str) -> ImportError:
    return ImportError(
        f"torchmoe cannot load {LIBRARY}: {reason}; it was built for torch {built_for} and this is "
        f"torch {torch.__version__}. To build it for this torch, run `{BUILD_COMMAND}` in the "
        "torchmoe source directory",
        name="torchmoe",
        path=str(LIBRARY),
    )


def built_torch_version() -> str:
    """The version of torch that this package was built for, known without loading the library."""
    try:
        version = import_module("torchmoe._build").TORCH_VERSION
    except ModuleNotFoundError as error:
        raise _error("the package has not been built", built_for="(no build)") from error
    return str(version)


def load() -> dict[str, str]:
    """Registers the ops with torch and returns the build information.

    Raises:
        ImportError: the library is missing, cannot be loaded, or was built for another minor
            version of torch.
    """
    built_for = built_torch_version()
    if _minor(built_for) != _minor(torch.__version__):
        raise _error("the versions of torch differ", built_for=built_for)
    if not LIBRARY.is_file():
        raise _error("there is no such file", built_for=built_for)
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
        extension = import_module("torchmoe._C")
    except (OSError, ImportError) as error:
        raise _error(str(error), built_for=built_for) from error
    return dict(extension.build_info())
