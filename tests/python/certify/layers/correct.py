"""The layers without a bug, by name: small ones in plain torch, and those of libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from certify.layers import foreign, own
from certify.layers.clamped import ClampedMoE
from certify.layers.dispatch import DispatchMoE
from certify.layers.grouped import GroupedMoE
from certify.layers.loop import InjectedMoE, LoopMoE, NoisyMoE, ScaledMoE, StackedMoE
from certify.layers.selection_bias import BiasMoE
from torchmoe import Adapter

Make = Callable[[int], nn.Module]


def build(layer: Callable[..., nn.Module], **options: Any) -> Make:
    """From a seed to the layer; the global generator is left as it was."""

    def make(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return layer(**options)

    return make


#: The layers that mutants change.
BASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "loop": (LoopMoE, {}),
    "loop_top1": (LoopMoE, {"top_k": 1, "normalise": False}),
    "loop_top3": (LoopMoE, {"top_k": 3}),
    "loop_jitter": (LoopMoE, {"jitter": 0.3}),
    "loop_z": (LoopMoE, {"z_coef": 0.1}),
    "loop_sequence": (LoopMoE, {"sequence_wise": True}),
    "loop_rank": (LoopMoE, {"first": 1, "held": 3}),
    "scaled": (ScaledMoE, {}),
    "noisy": (NoisyMoE, {}),
    "stacked": (StackedMoE, {}),
    "injected": (InjectedMoE, {}),
    "dispatch": (DispatchMoE, {}),
    "dispatch_top1": (DispatchMoE, {"top_k": 1, "normalise": False}),
    "dispatch_top3": (DispatchMoE, {"top_k": 3, "capacity_factor": 1.5}),
    "dispatch_probs": (DispatchMoE, {"drop_policy": "probs"}),
    "dispatch_recompute": (DispatchMoE, {"jitter": 0.5, "recompute": True}),
    "grouped": (GroupedMoE, {}),
    "grouped_gelu": (GroupedMoE, {"activation": "gelu"}),
    "grouped_square": (GroupedMoE, {"intermediate": 3}),
    "clamped": (ClampedMoE, {}),
    "bias": (BiasMoE, {}),
    "bias_negative": (BiasMoE, {"bias_mean": -2.0}),
    "bias_unnormalised": (BiasMoE, {"normalise": False}),
    "bias_top1": (BiasMoE, {"top_k": 1, "normalise": False, "scaling": 1.5}),
}

#: What of them cannot be seen.
ADAPTERS = {"relu": Adapter(balances=False)}

CORRECT: dict[str, Make] = {
    **{name: build(layer, **options) for name, (layer, options) in BASES.items()},
    **{name: build(make) for name, make in own.LAYERS.items()},
    **{name: build(make) for name, make in foreign.LAYERS.items()},
}
