"""What a forward pass finds in its layer's cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn

from torchmoe._checks import check_not_batched
from torchmoe._wide import wide_dtype
from torchmoe.nn.routers.context_router import RouterOutput, score
from torchmoe.nn.routing import Routing

if TYPE_CHECKING:
    from torchmoe.nn._live_decision import LiveDecision
    from torchmoe.nn.routing_cache import RoutingCache


class Recalled(NamedTuple):
    """What the tokens of a pass have found."""

    entry: Tensor
    """[T] int64; -1 = none."""
    ids: Tensor
    """[T, K] int64, -1 where there is none."""
    weights: Tensor | None
    """[T, K], if the router was left out."""

    def replace(self, chosen: Tensor) -> Tensor:
        """The ids [T, K] of a router or an estimator, with those of the entries for hits."""
        return self.ids.where((self.entry >= 0).unsqueeze(1), chosen)


class Recall:
    """A scorer for one pass: looks the gate inputs up before it has them scored.

    Which tensors have changed, and whether every gate input hits, are read back, so that a compiler
    breaks its graph here.

    Args:
        cache: where it looks.
        live: what the layer would choose.
        token_mask: [T] bool or None.
        num_tokens: T.
        may_skip: whether the router may be left out.
    """

    def __init__(
        self,
        cache: RoutingCache,
        live: LiveDecision,
        token_mask: Tensor | None,
        num_tokens: int,
        may_skip: bool,
    ) -> None:
        self._cache, self._live = cache, live
        self._token_mask, self._num_tokens = token_mask, num_tokens
        self._may_skip = may_skip
        self._entry: Tensor | None = None

    def __call__(self, router: nn.Module, gate_input: Tensor) -> RouterOutput:
        """See `look_up`, which no graph of a compiler holds."""
        if not torch.compiler.is_compiling():  # `disable` would load a compiler
            return self.look_up(router, gate_input)
        outside = torch.compiler.disable(self.look_up)  # type: ignore[no-untyped-call]
        return cast(RouterOutput, outside(router, gate_input))

    def look_up(self, router: nn.Module, gate_input: Tensor) -> RouterOutput:
        """The logits of gate inputs [R, G], each for T / R tokens; NaN if the router is left out.

        Raises:
            RuntimeError: the gate inputs are no floating-point vectors, or not on the CPU.
        """
        _check_gate_input(gate_input, self._num_tokens)
        self._gate_input = gate_input
        counts = counted_rows(self._token_mask, len(gate_input))
        with torch.no_grad():
            self._entry, holds = self._cache.find(gate_input.detach(), counts, self._live)
        self._skipped = self._may_skip and holds and _all_hit(self._entry >= 0, counts)
        if not self._skipped:
            return score(router, gate_input)
        self._reached = [gate_input, *router.parameters()]
        shape = len(gate_input), self._live.num_experts
        return RouterOutput(torch.full(shape, torch.nan, dtype=wide_dtype(gate_input.dtype)))

    def found(self) -> Recalled:
        """For each token, once the gate inputs have been scored."""
        entry = self._entry
        if entry is None:
            raise RuntimeError("MoE: router must call scorer for its scoring, got no call")
        rows = len(entry)
        if rows != self._num_tokens and rows:
            entry = entry.repeat_interleave(self._num_tokens // rows)
        if self._token_mask is not None:
            entry = entry.masked_fill(~self._token_mask, -1)
        ids = self._cache.ids_of(entry)
        if not self._skipped:
            return Recalled(entry, ids, None)
        weights = _WithoutRouter.apply(  # type: ignore[no-untyped-call]
            self._cache.weights_of(entry), *self._reached
        )
        return Recalled(entry, ids, weights)

    def details(self, recalled: Recalled) -> dict[str, Tensor]:
        """What `rows_of` reads again: under "gate_input" [R, G] and "cache_hit" [T]."""
        return {"gate_input": self._gate_input.detach(), "cache_hit": recalled.entry}


class LookedUp(NamedTuple):
    """The gate inputs of a pass."""

    gate_input: Tensor
    """[R, G]."""
    counts: Tensor
    """[R] bool: whether a token of it counts."""
    entry: Tensor
    """[R] int64: the entry that it was given, or -1."""
    ids: Tensor
    """[R, K]: the experts of its first token that counts."""


def rows_of(routing: Routing) -> LookedUp:
    """The gate inputs that a pass with a cache has looked up."""
    gate_input = routing.details["gate_input"].detach()
    gate_input = gate_input.reshape(-1, gate_input.shape[-1])
    hit, selected = routing.details["cache_hit"], routing.selected
    rows = len(gate_input)
    counts = counted_rows(routing.token_mask, rows)
    if counts is None:
        counts = torch.full((rows,), len(hit) > 0)
    if not rows or not len(hit):
        return LookedUp(gate_input, counts, hit.new_full((rows,), -1), selected[:0])
    each = len(hit) // rows
    first = torch.zeros(rows, dtype=torch.int64)
    if routing.token_mask is not None:
        first = routing.token_mask.view(rows, each).to(torch.uint8).argmax(dim=1)
    token = torch.arange(rows) * each + first
    return LookedUp(gate_input, counts, hit[token], selected[token])


def counted_rows(token_mask: Tensor | None, rows: int) -> Tensor | None:
    """Which of R gate inputs, each of T / R tokens in turn, have a token that counts; None: all."""
    if token_mask is None:
        return None
    if not len(token_mask):
        return token_mask.new_zeros(rows)
    return token_mask.view(rows, -1).any(dim=1)


def _all_hit(hits: Tensor, counts: Tensor | None) -> bool:
    """Whether there are some that count, and each of them hits."""
    return bool(hits.any()) and bool((hits if counts is None else hits | ~counts).all())


def _check_gate_input(gate_input: Tensor, num_tokens: int) -> None:
    check_not_batched("RoutingCache", "gate input", "be looked up", gate_input)
    if gate_input.dim() != 2 or not gate_input.is_floating_point():
        raise RuntimeError(
            "RoutingCache: gate input must be floating-point vectors [..., G], got "
            f"{gate_input.dtype} of shape {list(gate_input.shape)}"
        )
    if num_tokens and (not len(gate_input) or num_tokens % len(gate_input)):
        raise RuntimeError(
            f"RoutingCache: gate input must be one for each of {num_tokens} tokens, or for as many "
            f"that follow one another, got {len(gate_input)}"
        )
    if gate_input.device.type not in ("cpu", "meta"):
        raise RuntimeError(
            f"RoutingCache: gate input must be on the CPU, got it on {gate_input.device}"
        )


class _WithoutRouter(torch.autograd.Function):
    """The weights of entries, where those of a router would have had a gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weights: Tensor, *reached: Tensor) -> Tensor:
        del reached
        return weights.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401 (torch's own)
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:  # noqa: ANN401 (torch's own)
        raise _refused("a gradient")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:  # noqa: ANN401 (torch's own)
        raise _refused("a tangent")


def _refused(what: str) -> RuntimeError:
    return RuntimeError(
        'RoutingCache: reuse must be "ids" where a derivative is taken, got '
        f'{what} through a call with reuse "weights" that has left out its router'
    )
