"""Routers that read more than one token at a time, or choose the experts themselves.

A router that looks at each token alone is any module from gate inputs [T, G] to logits [T, E]. One
that looks at a whole sequence or batch, or that returns chosen ids in addition to logits, is a
`ContextRouter`. `route` calls either kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from torchmoe._wide import wide
from torchmoe.nn._part import Part
from torchmoe.nn.declarations import RouterDeclaration, declared_by_router


class RouterOutput(NamedTuple):
    """What a `ContextRouter` returns, or a router that returns its logits before noise too."""

    logits: Tensor
    """[..., E]: x's leading dimensions, one row for each token."""
    indices: Tensor | None = None
    """[..., K'] int64, best first, if the router chooses itself; -1 = not routed."""
    details: Mapping[str, Tensor] | None = None
    """Further values by name, for inspection; `Routing.details` passes them on."""
    clean_logits: Tensor | None = None
    """[..., E], the logits before Gaussian noise was added to them; None if none was."""
    noise_deviation: float | None = None
    """The standard deviation of the noise, above 0; None if none was added."""


#: What scores gate inputs [R, G] with a router that looks at each alone: `score`, or a stand-in.
Scorer = Callable[[nn.Module, Tensor], RouterOutput]


class ContextRouter(RouterDeclaration, Part):
    """Base class of routers that see x in its original shape, with its sequences.

    Your own router overrides `forward`:

        class Neighbour(ContextRouter):
            def __init__(self, hidden_size, num_experts):
                super().__init__()
                self.num_experts = num_experts
                self.linear = torch.nn.Linear(2 * hidden_size, num_experts)

            def forward(self, x, router_input=None, token_mask=None):
                before = torch.nn.functional.pad(x, (0, 0, 1, -1))  # each token's predecessor
                return RouterOutput(self.linear(torch.cat([x, before], dim=-1)))

    It may declare more about itself, see `RouterDeclaration`. A router that chooses may return
    indices; the estimator's `select` is then not called. A causal language model must not use a
    router that looks ahead: its held-out loss would not hold for text that is still to be written.

    Attributes:
        num_experts: E.
        scoring: the router inside that scores gate inputs [R, G], each for as many tokens that
            follow one another, if there is one: `forward` then also takes `scorer` and calls
            scorer(self.scoring, gate_input) in the place of `score`. A `RoutingCache` needs it.
    """

    num_experts: int
    scoring: nn.Module

    def forward(
        self, x: Tensor, router_input: Tensor | None = None, token_mask: Tensor | None = None
    ) -> RouterOutput:
        """Scores the experts, or chooses them, for every token.

        Args:
            x: [..., H], the layer's input, 0 where token_mask is False.
            router_input: what `MoE.forward` was given, 0 where token_mask is False; or None.
            token_mask: x's leading dimensions, bool, True = the token counts.

        Returns:
            The logits, and the optional fields if they apply.
        """
        raise NotImplementedError


def route(
    router: nn.Module,
    x: Tensor,
    num_experts: int,
    *,
    router_input: Tensor | None = None,
    token_mask: Tensor | None = None,
    scorer: Scorer | None = None,
) -> RouterOutput:
    """Calls a router of either kind.

    Args:
        router: a `ContextRouter`, or any module from gate inputs [T, G] to logits [T, E], which
            reads router_input instead of x if it is given.
        x: [..., H], 0 where token_mask is False.
        num_experts: E.
        router_input: see `MoE.forward`.
        token_mask: x's leading dimensions, bool.
        scorer: stands in for `score`; for a router with `scoring_of`.

    Returns:
        logits and clean_logits [T, E], float32 or wider, indices [T, K'] or None, and the other
        fields unchanged.

    Raises:
        RuntimeError: router_input or what the router returns has another shape or dtype.
        ValueError: noise_deviation is not a finite number above 0.
        TypeError: router_input is not a tensor, a ContextRouter does not return a RouterOutput,
            another router does not return a tensor, or a router returns indices although it
            declares that it does not choose.
    """
    leading = x.shape[:-1]
    num_tokens = math.prod(leading)
    if router_input is not None:
        router_input = _masked(router_input, leading, token_mask)
    declared = declared_by_router(router)
    if isinstance(declared, ContextRouter):
        # A custom router with `scoring` need not have a default for it.
        takes_scorer = scoring_of(router) is not None
        stand_in = {"scorer": scorer or score} if takes_scorer else {}
        given: Any = router(x, router_input, token_mask, **stand_in)
        if not isinstance(given, RouterOutput):
            raise TypeError(f"MoE: router must return a RouterOutput, got {type(given).__name__}")
        if given.indices is not None and not declared.chooses:
            raise TypeError(
                "MoE: router must have chooses = True to return indices, "
                f"got {type(declared).__name__} without"
            )
        logits, expected = given.logits, [*leading, num_experts]
        name = "[..., num_experts]"
    else:
        read = x if router_input is None else router_input
        tokens = read.reshape(num_tokens, *read.shape[len(leading) :])
        given = (scorer or score)(router, tokens)
        logits, expected = given.logits, [num_tokens, num_experts]
        name = "[num_tokens, num_experts]"
    if not isinstance(logits, Tensor):
        raise TypeError(f"MoE: router must return logits, a tensor, got {type(logits).__name__}")
    if list(logits.shape) != expected:
        raise RuntimeError(
            f"MoE: router must return {name} = {expected}, got shape {list(logits.shape)}"
        )
    if logits.device != x.device or logits.is_complex():
        raise RuntimeError(
            f"MoE: router must return real logits on {x.device}, "
            f"got {logits.dtype} on {logits.device}"
        )
    clean = given.clean_logits
    if clean is not None and not (isinstance(clean, Tensor) and clean.shape == logits.shape):
        got = f"shape {list(clean.shape)}" if isinstance(clean, Tensor) else type(clean).__name__
        raise RuntimeError(
            f"MoE: router must return clean_logits in the shape of logits {expected} or None, "
            f"got {got}"
        )
    _check_deviation(given.noise_deviation)
    # A custom router may return a 16-bit type, under autocast at least.
    return cast(RouterOutput, given)._replace(
        logits=wide(logits).reshape(num_tokens, num_experts),
        indices=_flat_indices(given.indices, leading, num_tokens),
        clean_logits=None if clean is None else wide(clean).reshape(num_tokens, num_experts),
    )


def score(router: nn.Module, x: Tensor) -> RouterOutput:
    """Calls a router that scores each token alone.

    Args:
        router: a module from gate inputs [T, G] to logits [T, E]. If its `tells_noise` is set, as
            that of `Router` is while it adds noise, it is called with as_output=True.
        x: [T, G].

    Returns:
        What it returned, unchecked.
    """
    if declared_by_router(router).tells_noise:
        return cast(RouterOutput, router(x, as_output=True))
    return RouterOutput(cast(Tensor, router(x)))


def scoring_of(router: nn.Module) -> nn.Module | None:
    """What scores gate inputs one by one: the router itself, or the one inside; None if none."""
    declared = declared_by_router(router)
    return getattr(declared, "scoring", None) if isinstance(declared, ContextRouter) else router


def _check_deviation(deviation: object) -> None:
    if deviation is None:
        return
    number = isinstance(deviation, int | float) and not isinstance(deviation, bool)
    if not number or not 0 < cast(float, deviation) < math.inf:
        raise ValueError(
            "MoE: router must return noise_deviation, a finite number > 0 or None, "
            f"got {deviation!r}"
        )


def _masked(router_input: Tensor, leading: torch.Size, token_mask: Tensor | None) -> Tensor:
    """The gate's own input, 0 where no token counts."""
    if not isinstance(router_input, Tensor):
        raise TypeError(
            f"MoE: router_input must be a tensor or None, got {type(router_input).__name__}"
        )
    if router_input.shape[: len(leading)] != leading:
        raise RuntimeError(
            f"MoE: router_input must have x's leading dimensions {list(leading)}, "
            f"got shape {list(router_input.shape)}"
        )
    if token_mask is None:
        return router_input
    added = router_input.dim() - len(leading)
    return router_input.masked_fill(~token_mask.reshape([*leading, *[1] * added]), 0)


def _flat_indices(indices: Tensor | None, leading: torch.Size, num_tokens: int) -> Tensor | None:
    if indices is None:
        return None
    if not isinstance(indices, Tensor):
        raise TypeError(
            f"MoE: router must return indices, a tensor or None, got {type(indices).__name__}"
        )
    if indices.dtype != torch.int64 or indices.shape[:-1] != leading:
        raise RuntimeError(
            f"MoE: router must return indices of int64 with leading dimensions {list(leading)}, "
            f"got {indices.dtype} of shape {list(indices.shape)}"
        )
    return indices.reshape(num_tokens, indices.shape[-1])
