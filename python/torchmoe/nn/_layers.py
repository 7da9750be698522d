"""The layers inside a model, and what they are called."""

from __future__ import annotations

from torch import nn

from torchmoe.nn.moe import MoE


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """Every MoE layer inside a model by its path, "moe" if the model is the layer.

    They are found wherever they are, inside WithAttachedLoss, DistributedDataParallel or a compiled
    model. What torch.compile puts into a path is not the model's: with and without it a layer has
    one name.
    """
    return {
        ".".join(part for part in path.split(".") if part != "_orig_mod") or "moe": module
        for path, module in model.named_modules()
        if isinstance(module, MoE)
    }
