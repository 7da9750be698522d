"""How records of settings are shown in a layer's repr."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any


class Settings:
    """Base of frozen dataclasses whose repr shows only the fields that differ from the defaults."""

    def __repr__(self) -> str:
        """What makes an equal record."""
        shown = ", ".join(f"{f.name}={self._shown(f.name)}" for f in self._changed())
        return f"{type(self).__name__}({shown})"

    def _shown(self, name: str) -> str:
        return repr(getattr(self, name))

    def _changed(self) -> Iterator[Field[Any]]:
        for field in fields(self):  # type: ignore[arg-type]
            is_default = field.default is not MISSING and getattr(self, field.name) == field.default
            if field.repr and not is_default:
                yield field
