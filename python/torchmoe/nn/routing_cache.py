"""A memory of how gate inputs were routed, for those that are like them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from torchmoe import ops
from torchmoe._checks import (
    Fixed,
    check_at_least,
    check_choice,
    check_kind,
    check_number,
)
from torchmoe.nn._entry_table import EntryTable
from torchmoe.nn._live_decision import LiveDecision, Snapshot
from torchmoe.nn._recall import Recall, rows_of
from torchmoe.nn.routing import Routing, routings_of

if TYPE_CHECKING:
    from torchmoe.nn.moe import MoE

REUSES = ("ids", "weights")
_COUNTS = ("hits", "lookups", "invalidated")


class CachedRouting(NamedTuple):
    """One entry of a `RoutingCache`."""

    key: Tensor
    """[G], float32 or wider: the gate input."""
    ids: Tensor
    """[K] int64, best first."""
    weights: Tensor
    """[K], as the gate forms them from the logits of the key."""
    uses: int
    """How many gate inputs it has served, the one that it was made from included."""


class RoutingCache:
    """Remembers the experts of gate inputs, and gives them to later ones that are similar.

    A gate input is what the router reads: a token, or the vector that a `SequenceRouter` has pooled
    from a sequence. One is similar to an entry's key k if

        <x, k> / (|x| |k|) >= similarity   and   similarity <= |x| / |k| <= 1 / similarity.

    The length counts because a router with a bias, or a sigmoid, depends on it. Candidates are
    found by random hyperplanes (`torchmoe.ops.cache_signatures`), so a similar key may be missed:
    at the default similarity a gate input at cosine 0.99 of a key finds it with probability 0.73,
    at 0.9999 almost surely, one equal to it always.

    A hit, which `routing.details["cache_hit"]` tells, takes the entry's ids. With reuse "ids" its
    weights are formed from its own logits, so that the router keeps its gradient. With "weights",
    in evaluation, a call in which every gate input hits takes the entries' weights too and leaves
    the router out: logits and losses are NaN, aux_loss is 0, and a gradient through the call is
    refused.

    An entry holds only while the router itself would choose its ids for its key. Parameters and
    buffers of router and estimator, the selection bias and the groups are compared with what they
    were at the last update; if one has changed, the router is asked again about each entry that is
    hit. An update drops the entries whose ids have changed. What cannot be seen there, such as
    another Python attribute of the router, needs `clear`. Noise that a router adds in training does
    not reach hits.

    Nothing moves in a forward pass. In training `MoE.update` moves the cache with the rest of the
    layer, after the optimizer's step; in evaluation `cache.update(output.routing)` moves it alone:
    gate inputs that find no entry become entries, in the order of the tokens. Every process has a
    cache of its own.

    It is no part of the layer's state dict. Loading one into the layer clears it; `state_dict`
    and `load_state_dict` save and restore it.

    Args:
        max_entries: M; a further entry evicts one.
        similarity: see above, in (0, 1].
        eviction: "lru" evicts the entry used longest ago, "lfu" the one used least often.
        reuse: "ids" or "weights", see above.

    Attributes:
        max_entries: see above; fixed, like similarity, eviction and reuse.
        hits: gate inputs that have found an entry, counted when the cache is updated.
        lookups: gate inputs that were looked up.
        invalidated: entries that were dropped because the router came to choose otherwise.

    Raises:
        TypeError: max_entries is not an int.
        ValueError: a value is out of range or unknown.
    """

    max_entries = Fixed[int]()
    similarity = Fixed[float]()
    eviction = Fixed[str]()
    reuse = Fixed[str]()

    def __init__(
        self,
        max_entries: int,
        similarity: float = 0.98,
        *,
        eviction: str = "lru",
        reuse: str = "ids",
    ) -> None:
        check_at_least("RoutingCache", "max_entries", max_entries, 1)
        check_number("RoutingCache", "similarity", similarity)
        if not 0 < similarity <= 1:
            raise ValueError(f"RoutingCache: similarity must be in (0, 1], got {similarity}")
        check_choice("RoutingCache", "eviction", eviction, ops.EVICTIONS)
        check_choice("RoutingCache", "reuse", reuse, REUSES)
        self.max_entries, self.similarity = max_entries, similarity
        self.eviction, self.reuse = eviction, reuse
        self._layer: MoE | None = None
        self.clear()

    @property
    def hit_rate(self) -> float:
        """The share of lookups that were hits; NaN before the first."""
        return self.hits / self.lookups if self.lookups else math.nan

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors: entries, hyperplanes and the copy of what decides."""
        held = [] if self._table is None else list(self._table.tensors().values())
        held += [] if self._snapshot is None else self._snapshot.tensors
        return sum(tensor.nbytes for tensor in held)

    def __len__(self) -> int:
        """How many entries there are."""
        return 0 if self._table is None else int(self._table.is_taken().sum())

    def __bool__(self) -> bool:
        """True: an empty cache is a cache."""
        return True

    def entry(self, number: int) -> CachedRouting:
        """The entry that a hit names.

        Raises:
            TypeError: number is not an int.
            IndexError: there is no such entry.
        """
        check_at_least("RoutingCache", "number", number, 0)
        table = self._table
        if table is None or number >= self.max_entries or not table.is_taken()[number]:
            raise IndexError(f"RoutingCache: number must be one of an entry, got {number}")
        return CachedRouting(
            table.keys[number].clone(),
            table.ids[number].clone(),
            table.weights[number].clone(),
            int(table.uses[number]),
        )

    def clear(self) -> None:
        """Forgets every entry, and sets the counts to 0."""
        self._table: EntryTable | None = None
        self._snapshot: Snapshot | None = None
        self.hits = self.lookups = self.invalidated = 0

    def state_dict(self) -> dict[str, Any]:
        """Copies of its tensors and counts, for `load_state_dict`."""
        state: dict[str, Any] = {name: getattr(self, name) for name in _COUNTS}
        return state if self._table is None else state | self._table.saved()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` of a cache with the same max_entries has returned.

        The entries are checked against the layer's router before they are used.

        Raises:
            TypeError: state_dict is not a dict.
            ValueError: it lacks an entry, or is that of a cache of another size.
        """
        check_kind("RoutingCache", "state_dict", state_dict, dict)
        has_table = "keys" in state_dict
        names = {*_COUNTS, *(EntryTable.SAVED if has_table else ())}
        if set(state_dict) != names:
            raise ValueError(
                f"RoutingCache: state_dict must have {', '.join(sorted(names))}, "
                f"got {', '.join(sorted(map(str, state_dict)))}"
            )
        top_k = None if self._layer is None else self._layer.top_k
        table = EntryTable.of_saved(state_dict, self.max_entries, top_k) if has_table else None
        self.clear()
        self._table = table
        self.hits, self.lookups, self.invalidated = (state_dict[name] for name in _COUNTS)

    @torch.no_grad()
    def update(self, routing: Routing | Sequence[Routing]) -> None:
        """Moves the cache by one call, or by several.

        Drops the entries whose ids the router would not choose any more, and remembers the gate
        inputs that no entry is similar to, in the order of the tokens. In training `MoE.update`
        calls it; after an update the parameters may change, and entries are checked again.

        Args:
            routing: what the layer returned, or a list of them. One that repeated a `decision` is
                passed over.

        Raises:
            TypeError: an item is not a Routing.
            ValueError: the list is empty.
            RuntimeError: the cache belongs to no layer.
        """
        looked_up = [rows_of(r) for r in routings_of(routing) if "cache_hit" in r.details]
        live = LiveDecision(self._bound())
        for seen in looked_up:
            self.lookups += int(seen.counts.sum())
            self.hits += int((seen.entry >= 0).sum())
            # The router may no longer take gate inputs like those of the entries.
            if self._table is not None and not self._table.takes(seen.gate_input):
                self._table = None
        if not self._is_current(live):
            self._drop_what_changed(live)
            self._snapshot = live.snapshot()
        for seen in looked_up:
            self._remember(seen.gate_input, seen.counts, live)

    @torch.no_grad()
    def second_look(self, routing: Routing, *, sample: int = 256) -> float:
        """How often the router would have chosen the experts that hits were given.

        Asks the layer's router, as it is now, about up to `sample` gate inputs that hit, at equal
        distances in the order of the tokens.

        Args:
            routing: what the layer returned.
            sample: the most gate inputs.

        Returns:
            The share of those experts, in [0, 1]; NaN without a hit.

        Raises:
            TypeError: routing is not a Routing, or sample not an int.
            ValueError: sample is below 1.
            RuntimeError: the cache belongs to no layer.
        """
        check_at_least("RoutingCache", "sample", sample, 1)
        (routing,) = routings_of(routing)
        live = LiveDecision(self._bound())
        if "cache_hit" not in routing.details:
            return math.nan
        seen = rows_of(routing)
        rows = (seen.entry >= 0).nonzero().squeeze(1)
        if not len(rows):
            return math.nan
        rows = rows[torch.linspace(0, len(rows) - 1, min(sample, len(rows))).long()]
        ids, _ = live.of(seen.gate_input[rows])
        given = seen.ids[rows][:, : ids.shape[1]]
        return float((ids.unsqueeze(2) == given.unsqueeze(1)).any(dim=2).double().mean())

    def bind(self, layer: MoE) -> None:
        """Makes it the cache of a layer; `MoE` calls it.

        Raises:
            ValueError: it is that of another one.
        """
        if self._layer not in (None, layer):
            raise ValueError(
                "MoE: cache must be a cache of its own, got one that belongs to another layer"
            )
        self._layer = layer

    def recall(self, token_mask: Tensor | None, num_tokens: int) -> Recall:
        """A scorer that looks up what it scores; `MoE.forward` calls it for each pass.

        Args:
            token_mask: [T] bool or None.
            num_tokens: T.

        Raises:
            RuntimeError: the layer is in training mode, and reuse is "weights".
        """
        layer = self._bound()
        if layer.training and self.reuse == "weights":
            raise RuntimeError(
                'RoutingCache: reuse must be "ids" in training, where the router needs a '
                'gradient, got "weights"; call eval() first'
            )
        may_skip = self.reuse == "weights"
        return Recall(self, LiveDecision(layer), token_mask, num_tokens, may_skip)

    def find(
        self, gate_input: Tensor, counts: Tensor | None, live: LiveDecision
    ) -> tuple[Tensor, bool]:
        """The entry of each gate input, among those that hold; and whether nothing has changed.

        Args:
            gate_input: [R, G].
            counts: [R] bool or None, True = it is looked up.
            live: what the layer would choose.

        Returns:
            [R] int64, -1 = none; and whether all that decides is as at the last update, so that the
            weights of entries hold, too.
        """
        table = self._table
        if table is None or not table.takes(gate_input):
            return torch.full(gate_input.shape[:1], -1, device=gate_input.device), False
        signatures = ops.cache_signatures(gate_input, table.planes, row_mask=counts)
        entry = ops.cache_lookup(
            gate_input, signatures, table.entries, table.order, self.similarity
        )
        if self._is_current(live):
            return entry, True
        hit = torch.unique(entry[entry >= 0])
        ids, _ = live.of(table.keys[hit].to(table.dtype))
        changed = torch.zeros(self.max_entries, dtype=torch.bool)
        changed[hit] = (ids != table.ids[hit]).any(dim=1)
        return entry.masked_fill((entry >= 0) & changed[entry.clamp(min=0)], -1), False

    def _is_current(self, live: LiveDecision) -> bool:
        """Whether nothing that decides has changed since the last update."""
        return self._snapshot is not None and self._snapshot.is_of(live)

    def ids_of(self, entry: Tensor) -> Tensor:
        """The experts [N, K] of entries [N], -1 where there is none."""
        if self._table is None:
            return entry.new_full((len(entry), self._bound().top_k), -1)
        return self._table.of(entry, self._table.ids, missing=-1)

    def weights_of(self, entry: Tensor) -> Tensor:
        """The weights [N, K] of entries [N], some of which were hit; 0 where there is none."""
        table = cast(EntryTable, self._table)  # which a hit has
        return table.of(entry, table.weights, missing=0)

    def _bound(self) -> MoE:
        if self._layer is None:
            raise RuntimeError(
                "RoutingCache: the cache must belong to a layer, MoE(..., cache=cache), got one "
                "without"
            )
        return self._layer

    def _drop_what_changed(self, live: LiveDecision) -> None:
        table = self._table
        if table is None:
            return
        held = table.is_taken().nonzero().squeeze(1)
        ids, weights = live.of(table.keys[held].to(table.dtype))
        changed = held[(ids != table.ids[held]).any(dim=1)]
        table.weights[held] = weights.to(table.weights.dtype)
        table.key_signatures[changed] = -1
        self.invalidated += len(changed)
        table.sort()

    def _remember(self, gate_input: Tensor, counts: Tensor, live: LiveDecision) -> None:
        if not len(gate_input):
            return
        table = self._table
        if table is None or not table.takes(gate_input):
            table = self._table = EntryTable.like(
                gate_input, self.max_entries, live.top_k, self.similarity
            )
        signatures = ops.cache_signatures(gate_input, table.planes, row_mask=counts)
        row, table.last_used, table.uses = ops.cache_insert(
            gate_input,
            signatures,
            table.entries,
            table.last_used,
            table.uses,
            self.similarity,
            self.eviction,
        )
        taken = (row >= 0).nonzero().squeeze(1)
        if not len(taken):
            return
        row = row[taken]
        ids, weights = live.of(gate_input[row])
        table.keys[taken] = gate_input[row].to(table.keys.dtype)
        table.key_signatures[taken] = signatures[row]
        table.ids[taken] = ids
        table.weights[taken] = weights.to(table.weights.dtype)
        table.sort()

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingCache:
        """A cache of its own, of the layer's copy if the layer is being copied."""
        copied = RoutingCache(
            self.max_entries, self.similarity, eviction=self.eviction, reuse=self.reuse
        )
        memo[id(self)] = copied
        copied.load_state_dict(self.state_dict())
        copied._layer = memo.get(id(self._layer))
        return copied

    def __repr__(self) -> str:
        """The settings, and how many entries there are."""
        settings = "".join(
            f", {name}={getattr(self, name)!r}"
            for name, usual in (("similarity", 0.98), ("eviction", "lru"), ("reuse", "ids"))
            if getattr(self, name) != usual
        )
        return f"RoutingCache({self.max_entries}{settings})"
