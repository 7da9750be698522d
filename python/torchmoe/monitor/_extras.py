"""What the parts that draw and print need beyond torch."""

from __future__ import annotations


def missing(owner: str, method: str, package: str) -> ImportError:
    """The error that says which package a method needs and how to get it."""
    return ImportError(f"{owner}: {method} needs {package}: pip install 'torchmoe[watch]'")
