"""The arguments of what moves experts into a file, as rows."""

from __future__ import annotations

import copy
import functools
import tempfile
from typing import Any

import torch

from torchmoe.nn import Experts, MoE
from torchmoe.offload import (
    OffloadedExperts,
    link,
    measure_machine,
    offload,
    plan_offload,
    write_store,
)
from wrong_arguments import Case

H, INNER, E, K = 4, 3, 4, 2
EXPERTS = Experts(H, INNER, E).requires_grad_(False)
OFFLOADED = offload(copy.deepcopy(EXPERTS), budget=1 << 30)
LAYER = MoE(H, None, E, K, experts=OFFLOADED)


@functools.wraps(offload)
def _offload(experts: Any, **options: Any) -> OffloadedExperts:
    """Of a copy, since those that are given lose their values."""
    return offload(copy.deepcopy(experts), **options)


@functools.wraps(write_store)
def _write(path: Any, experts: Any, expert: Any = None) -> None:
    """In a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        write_store(f"{folder}/{path}" if isinstance(path, str) else path, experts, expert)


OFFLOAD = [
    Case(
        _offload,
        "offload",
        {"experts": EXPERTS, "budget": 1 << 30},
        {
            "experts": "part",
            "budget": "size",
            "store": "part",
            "policy": "name",
            "prefetch": "flag",
            "trace": "part",
            "device": "device",
        },
        takes={"store": ("text",)},
    ),
    Case(link, "link", {"layers": [LAYER]}, {"layers": "part"}),
    Case(
        _write,
        "write_store",
        {"path": "store", "experts": EXPERTS},
        {"path": "part", "experts": "part", "expert": "part"},
        takes={"path": ("text",)},
    ),
    Case(
        plan_offload,
        "plan_offload",
        {"experts": EXPERTS, "num_tokens": 5, "top_k": K, "budget": 1 << 20}
        | dict.fromkeys(("bandwidth", "flops", "memory_bandwidth"), 1e9),
        {
            "experts": "part",
            "num_tokens": "size",
            "top_k": "size",
            "budget": "size",
            "bandwidth": "number",
            "flops": "number",
            "memory_bandwidth": "number",
            "overhead": "number",
            "overlap": "number",
            "num_layers": "size",
            "hit_rate": "number",
            "usage": "tensor",
            "prefetch": "flag",
            "training": "flag",
        },
    ),
    Case(
        measure_machine,
        "measure_machine",
        {"experts": EXPERTS},
        {"experts": "part", "folder": "part"},
        takes={"folder": ("text",)},
    ),
    Case(OFFLOADED.warm, "warm", {"usage": torch.full((E,), 1 / E)}, {"usage": "tensor"}),
]
