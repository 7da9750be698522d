"""The classes of experts of the installed transformers, and small modules of them."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import transformers
from torch import nn

_DECORATOR = "use_experts_implementation"
_FOLDER = Path(transformers.__file__).parent / "models"


class ExpertsClass(NamedTuple):
    """A class under transformers' decorator."""

    package: str
    """Below `transformers.models`."""
    module: str
    """Inside the package."""
    name: str
    settings: frozenset[str]
    """What its __init__ reads of its config."""


def experts_classes() -> list[ExpertsClass]:
    """All of them, found in the sources without importing one."""
    return [
        ExpertsClass(path.parent.name, path.stem, node.name, _settings(node))
        for path in sorted(_FOLDER.glob("*/modeling_*.py"))
        if f"@{_DECORATOR}" in (source := path.read_text(encoding="utf-8"))
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
        and any(_DECORATOR in ast.unparse(decorator) for decorator in node.decorator_list)
    ]


def small(
    experts: ExpertsClass, *, num_experts: int, hidden_size: int, intermediate_size: int
) -> nn.Module:
    """A module of the class with the settings of its default config, but for the sizes.

    Its parameters are as the class leaves them, which is mostly uninitialised.

    Args:
        experts: from experts_classes.
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.

    Raises:
        ImportError: its file needs a library that is not installed.
        ValueError: no config of its package has what the class reads.
    """
    module = importlib.import_module(f"transformers.models.{experts.package}.{experts.module}")
    for config in _configs(module):
        if not all(hasattr(config, name) for name in experts.settings):
            continue
        for name in experts.settings:
            size = _size(name, num_experts, hidden_size, intermediate_size)
            if size is not None and not isinstance(getattr(config, name), list):
                setattr(config, name, size)
        config._experts_implementation = "eager"
        kind = getattr(module, experts.name)
        # Where the config has a list, the class is told which of its sizes it has.
        sizes = {"intermediate_size": intermediate_size}
        taken = inspect.signature(kind.__init__).parameters
        made = kind(config, **{name: sizes[name] for name in sizes if name in taken})
        assert isinstance(made, nn.Module)
        return made
    raise ValueError(
        f"small: experts must be of a package with a config that has "
        f"{', '.join(sorted(experts.settings))}, got {experts.package}"
    )


def _settings(node: ast.ClassDef) -> frozenset[str]:
    """The attributes of `config` in the class's __init__."""
    return frozenset(
        inner.attr
        for function in node.body
        if isinstance(function, ast.FunctionDef) and function.name == "__init__"
        for inner in ast.walk(function)
        if isinstance(inner, ast.Attribute)
        and isinstance(inner.value, ast.Name)
        and inner.value.id == "config"
    )


def _configs(module: ModuleType) -> Iterator[Any]:
    """The default configs of the module's package."""
    package = module.__name__.rpartition(".")[0]
    for path in sorted((_FOLDER / package.rpartition(".")[2]).glob("configuration_*.py")):
        configuration = importlib.import_module(f"{package}.{path.stem}")
        for _, kind in inspect.getmembers(configuration, inspect.isclass):
            if (
                issubclass(kind, transformers.PreTrainedConfig)
                and kind.__module__ == configuration.__name__
            ):
                yield kind()


def _size(setting: str, num_experts: int, hidden_size: int, intermediate_size: int) -> int | None:
    """What a setting of this name is set to, None if it is not a size."""
    if "experts" in setting:
        return num_experts
    if "intermediate" in setting:
        return intermediate_size
    return hidden_size if setting.endswith(("hidden_size", "latent_size")) else None
