"""Small experts, and what a store of them reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchmoe.nn import Experts
from torchmoe.offload.store import ExpertStore

H, INNER, E = 24, 20, 5
BYTES = 4 * E * (2 * INNER * H + 2 * INNER + H * INNER + H)


def made(device: str = "cpu", **options: Any) -> Experts:
    return Experts(H, INNER, E, device=device, **options).requires_grad_(False)


def tensors(experts: Experts) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in experts.named_parameters()}


def one_of(experts: Experts) -> Callable[[int], dict[str, Tensor]]:
    return lambda expert: {name: tensor[expert] for name, tensor in tensors(experts).items()}


def room(experts: Experts) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor[0], 7.0) for name, tensor in tensors(experts).items()}


def check_reads(store: ExpertStore, experts: Experts) -> None:
    into = room(experts)
    for expert in reversed(range(experts.num_experts)):
        assert store.read(expert, into) == store.expert_bytes
        for name, tensor in tensors(experts).items():
            assert torch.equal(into[name], tensor[expert])
