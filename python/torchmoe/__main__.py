"""`python -m torchmoe`: what a bug report needs to say about the installation."""

from __future__ import annotations

import sys

from torchmoe._report import report


def main() -> int:
    """Prints the report."""
    try:
        print(report(), flush=True)
    except OSError as error:  # a full disk, or a reader that went away
        sys.stdout = None  # Python would try once more when it exits
        if isinstance(error, BrokenPipeError):
            return 1
        print(f"torchmoe: cannot write its report: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
