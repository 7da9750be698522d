"""Loads the ops, or says in one sentence why it cannot.

Two files that the build puts next to this one are read: `_build.py` (how the library was built) and
`libtorchmoe.so` (the ops). The torch version is compared before the library is touched: one built
for another minor version of torch fails with undefined symbols or worse.
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


def _error(reason: str, *, advice: str = "") -> ImportError:
    """One sentence on why, and one on what helps."""
    advice = advice or (
        f"To build it for this torch, run `{BUILD_COMMAND}` in the torchmoe source directory"
    )
    return ImportError(
        f"torchmoe cannot load {LIBRARY}: {reason}. {advice}", name="torchmoe", path=str(LIBRARY)
    )


def _for_another_torch(reason: str, built_for: str) -> ImportError:
    """Where the versions of torch are the first thing to look at."""
    return _error(
        f"{reason}; it was built for torch {built_for} and this is torch {torch.__version__}"
    )


def build_info() -> dict[str, str]:
    """How this package was built, known without loading the library; see torchmoe.build_info."""
    try:
        return dict(import_module("torchmoe._build").INFO)
    except ModuleNotFoundError as error:
        raise _error("the package has not been built") from error


def other_copy() -> str | None:
    """The library of another copy of the package that this process has loaded.

    It may be one that an installation has since replaced. Registering the ops a second time ends
    the process.
    """
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return None
    # Address, permissions, offset, device and inode come before the path.
    fields = (line.split(maxsplit=5) for line in maps.read_text().splitlines())
    for path in sorted({parts[5] for parts in fields if len(parts) == 6}):
        file = Path(path.removesuffix(" (deleted)"))
        here = file.exists() and file.samefile(LIBRARY) and str(file) == path
        if file.name == LIBRARY.name and not here:
            return path
    return None


def load() -> dict[str, str]:
    """Registers the ops with torch and returns the build information.

    Raises:
        ImportError: the library is missing, cannot be loaded, was built for another minor version
            of torch, or another copy of it is loaded already.
    """
    info = build_info()
    built_for = info["torch"]
    if _minor(built_for) != _minor(torch.__version__):
        raise _for_another_torch("the versions of torch differ", built_for)
    if not LIBRARY.is_file():
        raise _for_another_torch("there is no such file", built_for)
    if (other := other_copy()) is not None:
        raise _error(
            f"this process has loaded another copy, {other}",
            advice="One process can hold one: leave one of them on sys.path",
        )
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:
        # torch's own error names the file; that of the loader below it says what is wrong.
        raise _for_another_torch(str(error.__cause__ or error), built_for) from error
    return info
