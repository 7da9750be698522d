"""Steps 10 and 11: how much an expert takes, and what is refused."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from torch import Tensor

import torchmoe
from torchmoe import ops
from walkthrough.made_up import (
    EXPERTS,
    FINE_SLOTS,
    POETRY,
    SENTENCES_AT_ONCE,
    TOP_K,
    make_router,
)
from walkthrough.printing import heading, slots_of, span, table
from walkthrough.ten_tasks import Row

# ---- computed


@dataclass(frozen=True)
class Room:
    """How many of a batch's slots each expert takes."""

    factor: Tensor
    """[E], max(1, load / mean load), to three decimals, rounded up."""
    even: int
    """Slots of each expert without history."""
    capacity: Tensor
    """[E], slots of each expert with it."""
    wanted: Tensor
    """[T, K], the experts that each sentence chooses."""
    served_evenly: Tensor
    """[T, K], the same after the even capacity; -1 = refused."""
    served: Tensor
    """[T, K], the same after the capacity with history."""


def fill(row: Row) -> Room:
    """A batch of such sentences at once, more than the favourite has room for."""
    experts = len(EXPERTS)
    slots = TOP_K * SENTENCES_AT_ONCE
    factor = torchmoe.dynamic_capacity(row.usage, experts * FINE_SLOTS) / FINE_SLOTS
    even = torchmoe.expert_capacity(SENTENCES_AT_ONCE, experts, TOP_K, 1)
    capacity = torchmoe.dynamic_capacity(row.usage, slots)
    wanted = ops.select_experts(row.logits.expand(SENTENCES_AT_ONCE, -1), TOP_K)
    return Room(
        factor,
        even,
        capacity,
        wanted,
        ops.limit_capacity(wanted, even, num_experts=experts),
        ops.limit_capacity(wanted, capacity),
    )


def ask_for_a_refusal(gate_input: Tensor) -> str:
    """What the library says to a gate of one expert whose weight is 1 whatever it learns."""
    router = make_router(usage_scaling=False)
    logits = router(gate_input.unsqueeze(0))
    try:
        ops.gate_weights(
            logits,
            ops.select_experts(logits.detach(), 1),
            score_function="softmax",
            normalize="topk",
            estimator="exact",
        )
    except ValueError as error:
        return str(error)
    raise AssertionError("the library accepts a gate that could never learn")


# ---- told


def tell_capacity(room: Room, row: Row) -> None:
    """How much an expert takes, and what it refuses."""
    heading(10, "The capacity factor: max(1, load / mean load)")
    print(
        f"Then {SENTENCES_AT_ONCE} such sentences come at once, with "
        f"{TOP_K * SENTENCES_AT_ONCE} slots: {room.even} for each expert if all had "
        "the same.\nfactor_i = max(1, usage_i / mean usage);   room_i = ceil(factor_i x slots / 8)"
    )
    table(
        ("expert", "usage", "factor", "room", "wanted", "kept", "refused"),
        [
            (
                f"{i} {EXPERTS[i]}",
                f"{row.usage[i]:.3f}",
                f"{room.factor[i]:.3f}",
                str(room.capacity[i].item()),
                str(wanted := int((room.wanted == i).sum())),
                str(kept := int((room.served == i).sum())),
                str(wanted - kept),
            )
            for i in range(len(EXPERTS))
        ],
    )


def tell_refusal(room: Room, refusal: str) -> None:
    """A slot that finds its expert full, and a gate that could never learn."""
    heading(11, "A refusal")
    refused = [n for n, row in enumerate(room.served.tolist(), 1) if row[0] < 0]
    evenly = [n for n, row in enumerate(room.served_evenly.tolist(), 1) if row[0] < 0]
    print(
        "A full expert refuses a slot, which becomes -1. The two choices, sentence by sentence:\n"
        f"wanted                 {slots_of(room.wanted)}\n"
        f"room for {room.even} each        {slots_of(room.served_evenly)}\n"
        f"room by history        {slots_of(room.served)}\n"
        f"{EXPERTS[POETRY].capitalize()} refuses sentences {span(evenly)} with even room, "
        f"{span(refused)} with room by history."
    )
    print(
        "\nThe library refuses, too: a gate with one expert per token, whose weight w = p / p = 1\n"
        "is constant, asked for the exact gradient, which is 0 whatever happens. It says\n"
    )
    print(textwrap.indent(textwrap.fill(f"ValueError: {refusal}", 90), "  "))
