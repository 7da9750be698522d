"""`python -m torchmoe.testing path.to:factory`: a layer's certificate, for a shell and CI."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from torchmoe.testing.certify import certify
from torchmoe.testing.certify.laws import known_laws

_FAILED, _UNUSABLE = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Tests the laws and prints the certificate.

    Args:
        arguments: the command line's; by default those of the program.

    Returns:
        0 if the certificate passed, 1 if it did not, 2 if there is none.
    """
    options = _parser().parse_args(arguments)
    sys.path.insert(0, os.getcwd())
    try:
        layer = _load(options.layer)()
        adapter = _load(options.adapter) if options.adapter else None
        certificate = certify(
            layer,
            adapter=adapter() if callable(adapter) else adapter,
            hidden_size=options.hidden_size,
            laws=_laws(options.laws),
            dtype=getattr(torch, options.dtype),
            seed=options.seed,
        )
    except (Exception, SystemExit) as error:  # of the user's module or factory, whatever it is
        print(f"torchmoe.testing: {type(error).__name__}: {error}", file=sys.stderr)
        return _UNUSABLE
    if options.json:
        print(certificate.to_json())
    elif options.markdown:
        print(certificate.to_markdown(), end="")
    else:
        print(certificate)
    return 0 if certificate else _FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torchmoe.testing",
        description="Asks a mixture-of-experts layer whether the laws of such layers hold.",
        epilog="laws: " + ", ".join(law.name for law in known_laws()),
    )
    parser.add_argument(
        "layer", help="path.to:factory, a module's class or a function without arguments"
    )
    parser.add_argument("--adapter", help="path.to:name, a torchmoe.Adapter or what makes one")
    parser.add_argument("--hidden-size", type=int, help="where the layer does not show it")
    parser.add_argument("--laws", default="all", help='names with commas between them; "all"')
    parser.add_argument("--dtype", default="float64", choices=("float64", "float32"))
    parser.add_argument("--seed", type=int, default=0)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="every field, for programs")
    form.add_argument("--markdown", action="store_true", help="for a comment on a change")
    return parser


def _laws(names: str) -> str | list[str]:
    return names if names == "all" else [name.strip() for name in names.split(",")]


def _load(path: str) -> Any:  # noqa: ANN401 (whatever the user has there)
    module, separator, name = path.partition(":")
    if not separator or not name:
        raise ValueError(f"the path must be path.to:name, got {path}")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


if __name__ == "__main__":
    sys.exit(main())
