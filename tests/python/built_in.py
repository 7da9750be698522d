"""What is built in, from the package's own tables: what is added there, every test takes up."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from torchmoe.nn import Estimator, Router, known_estimators, routers
from torchmoe.nn.estimators.registry import build_estimator

#: Name -> class.
ESTIMATORS: dict[str, type[Estimator]] = {
    name: type(build_estimator(name)) for name in known_estimators()
}
ROUTERS: tuple[type[nn.Module], ...] = tuple(
    kind
    for name in routers.__all__
    if issubclass(kind := getattr(routers, name), nn.Module) and kind is not routers.ContextRouter
)


def without(named: Sequence[type[nn.Module]]) -> dict[str, type[nn.Module]]:
    """The routers that a test does not name itself, by what it may call them."""
    return {
        re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower().removesuffix("_router"): kind
        for kind in ROUTERS
        if kind not in named
    }


def needed(kind: type[nn.Module], *sizes: int, **options: Any) -> dict[str, Any]:
    """What a router's constructor needs, by its arguments' names.

    Args:
        kind: the router's class.
        sizes: hidden size, number of experts, top_k.
        options: device and dtype, for those that take them or wrap a router that does.
    """
    given = dict(zip(("hidden_size", "num_experts", "top_k"), sizes, strict=True))
    arguments = inspect.signature(kind).parameters
    if "router" in arguments:
        given["router"] = Router(*sizes[:2], **options)
    asked = {"top_k", *options}  # in addition to what has no default
    return {
        name: value
        for name, value in (given | options).items()
        if name in arguments
        and (name in asked or arguments[name].default is inspect.Parameter.empty)
    }


def make_router(kind: type[nn.Module], *sizes: int, **options: Any) -> nn.Module:
    """A router of this kind with its defaults; see `needed`."""
    return kind(**needed(kind, *sizes, **options))
