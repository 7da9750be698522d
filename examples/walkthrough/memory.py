"""Step 12: a gate that remembers its choices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchmoe import RoutingCache
from torchmoe.nn import MoE
from walkthrough.decision import pool
from walkthrough.made_up import (
    EXPERTS,
    FIXED_INPUT,
    PARAPHRASE,
    PARAPHRASED_MATRIX,
    SENTENCE,
    TOP_K,
    make_layer,
    make_router,
    vector,
)
from walkthrough.printing import heading, table

# ---- computed


@dataclass(frozen=True)
class Visit:
    """One gate input before a gate with a memory."""

    what: str
    similarity: float | None
    """The cosine with the nearest key; None if nothing is remembered."""
    entry: int
    """Whose choice it was given; -1 = none."""
    chosen: list[int]
    """K experts, the best first."""
    remembered: int
    """How many entries there are afterwards."""


@dataclass(frozen=True)
class Memory:
    """What comes before the gate, one after the other."""

    bound: float
    """The least cosine of a hit."""
    margin: float
    """What the best expert that was not chosen lacks of the last that was."""
    next_best: int
    """That expert."""
    visits: list[Visit]


def remember(gate_input: Tensor) -> Memory:
    """The sentence, one like it, another one; then the gate changes, a little and by more."""
    cache = RoutingCache(4)
    router = make_router(usage_scaling=False)
    layer = make_layer(router, balance_weight=0.0, cache=cache).eval()
    paraphrase = pool(PARAPHRASED_MATRIX).gate_input
    ranked = router(gate_input.unsqueeze(0)).flatten().sort(descending=True)
    margin = (ranked.values[TOP_K - 1] - ranked.values[TOP_K]).item()
    next_best = int(ranked.indices[TOP_K])
    visits = [
        visit(layer, "the sentence", gate_input),
        visit(layer, "its paraphrase", paraphrase),
        visit(layer, "another one", vector(FIXED_INPUT)),
    ]
    before = router.bias[next_best].item()
    for total in (0.5, 1.5):
        with torch.no_grad():
            router.bias[next_best] = before + total * margin
        visits.append(visit(layer, f"the sentence, b + {total:g} m", gate_input))
    return Memory(cache.similarity, margin, next_best, visits)


def visit(layer: MoE, what: str, gate_input: Tensor) -> Visit:
    """One pass, and what is remembered of it."""
    cache = layer.cache
    assert cache is not None
    keys = [cache.entry(number).key for number in range(len(cache))]
    with torch.no_grad():
        routing = layer(gate_input.unsqueeze(0)).routing
        cosines = [torch.cosine_similarity(gate_input, key, dim=0).item() for key in keys]
        cache.update(routing)
    return Visit(
        what,
        max(cosines, default=None),
        int(routing.details["cache_hit"]),
        routing.selected[0].tolist(),
        len(cache),
    )


# ---- told


def tell_memory(memory: Memory) -> None:
    """A miss, a hit with its similarity, and an entry that no longer holds."""
    heading(12, "A memory of choices")
    print(
        f'"{PARAPHRASE.capitalize()}" is the same wish in other words.\n'
        "A gate with a RoutingCache gives it the experts of the sentence that it resembles, by\n"
        f"cosine (at least {memory.bound}) and length. {EXPERTS[memory.next_best].capitalize()}, "
        f"the best that was not chosen, lacks\nm = {memory.margin:.4f}: its bias b in the gate "
        "grows by half of that, and then by m more."
    )
    table(
        ("before the gate", "cosine", "entry", "experts", "entries after"),
        [
            (
                visit.what,
                "-" if visit.similarity is None else f"{visit.similarity:.4f}",
                "miss" if visit.entry < 0 else str(visit.entry),
                ", ".join(EXPERTS[e] for e in visit.chosen),
                str(visit.remembered),
            )
            for visit in memory.visits
        ],
    )
    last = memory.visits[-1]
    print(
        f'The entry of "{SENTENCE}" holds while the gate would choose\n'
        "the same. After the second step it would not: the entry is dropped, though its key is\n"
        f"the very same, and the gate's new choice, {EXPERTS[last.chosen[0]]} and "
        f"{EXPERTS[last.chosen[1]]}, is remembered."
    )
