"""What a bug report needs to say about the installation, whether or not it can be loaded.

Python's own library alone is imported here: torch may be what is missing.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).absolute().parent
NONE = "none"


def report(problem: ImportError | None = None) -> str:
    """The installation, one fact per line.

    Args:
        problem: why the package could not be imported, None where it was.
    """
    built = _built()
    facts = {
        "torchmoe": f"{built.get('torchmoe', 'not built')} "
        f"(git revision {built.get('git_revision', 'unknown')})",
        "library": str(PACKAGE / "libtorchmoe.so"),
        "built for": f"torch {built.get('torch', NONE)}, CUDA {built.get('cuda', NONE)}",
        "compiler": f"{built.get('compiler', NONE)}, OpenMP {built.get('openmp', NONE)}",
        "torch": _torch(),
        "Python": f"{platform.python_implementation()} {platform.python_version()}, "
        f"{sys.executable}",
        "platform": platform.platform(),
        "cmake prefix": str(PACKAGE / "share" / "cmake"),
    }
    if problem is not None:
        facts["problem"] = str(problem)
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items())


@contextmanager
def reported() -> Iterator[None]:
    """Lets `python -m torchmoe` print the report where the package cannot be imported.

    Python imports a package before its __main__.
    """
    try:
        yield
    except ImportError as error:
        asked = sys.argv[:1] == ["-m"] and "torchmoe" in sys.orig_argv
        if not asked:
            raise
        print(report(error), flush=True)
        sys.exit(1)


def _built() -> dict[str, str]:
    """What the build has written down, nothing where there was none."""
    try:
        from torchmoe import _build
    except ImportError:
        return {}
    return dict(_build.INFO)


def _torch() -> str:
    """What torch is at hand, and where; it is not imported for this."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return NONE
    torch = sys.modules.get("torch")
    try:
        if torch is None:
            version = metadata.version("torch")
        else:
            cuda, threads = torch.version.cuda or NONE, torch.get_num_threads()
            version = f"{torch.__version__}, CUDA {cuda}, {threads} threads"
    except (AttributeError, metadata.PackageNotFoundError):
        version = "of an unknown version"
    return f"{version}, {Path(found.origin).parent}"
