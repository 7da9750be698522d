"""Context routers that wrap a router that scores tokens one by one."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from torchmoe._checks import Fixed
from torchmoe.nn._first_values import reset
from torchmoe.nn.declarations import declared_by_router
from torchmoe.nn.routers._usage import usage_of
from torchmoe.nn.routers.context_router import ContextRouter


class WrappingRouter(ContextRouter):
    """Holds the router that scores, and passes on its usage.

    Args:
        router: a module from gate inputs [T, H] to logits [T, E] with num_experts or out_features.

    Raises:
        TypeError: router is something else.
    """

    num_experts = Fixed[int]()

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        declared = declared_by_router(router)
        chooses = isinstance(declared, ContextRouter) or declared.chooses
        if not isinstance(router, nn.Module) or chooses:
            raise TypeError(
                f"{type(self).__name__}: router must be a module that scores each token alone, "
                f"such as Router or CosineRouter, got {type(router).__name__}"
            )
        self.router = router
        self.num_experts = self._size("num_experts", "out_features")

    def _size(self, *names: str) -> int:
        """The size that the router inside declares under one of these names."""
        for name in names:
            if isinstance(size := getattr(self.router, name, None), int):
                return size
        raise TypeError(
            f"{type(self).__name__}: router must have {names[0]}, got {type(self.router).__name__}"
        )

    @property
    def keeps_usage(self) -> bool:  # type: ignore[override]
        """Whether the router inside does."""
        return declared_by_router(self.router).keeps_usage

    @property
    def reads_usage(self) -> bool:  # type: ignore[override]
        """Whether the router inside does."""
        return declared_by_router(self.router).reads_usage

    @property
    def usage(self) -> Tensor | None:
        """That of the router inside."""
        return usage_of(self.router)

    def update(self, tokens_per_expert: Tensor, num_slots: Tensor) -> None:
        """Moves the usage of the router inside, see `Router.update`."""
        cast(Any, self.router).update(tokens_per_expert, num_slots)

    def reset_parameters(self) -> None:
        """Gives the router inside its first values again."""
        reset(self.router)
