"""What the layers of this package tell of themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchmoe.nn.attached_loss import WithAttachedLoss
from torchmoe.nn.declarations import RouterDeclaration
from torchmoe.nn.estimators.estimator import Estimator
from torchmoe.nn.moe import MoE
from torchmoe.testing._estimator_surrogate import EstimatorSurrogate

Surrogate = Callable[[nn.Module, Tensor], Any]


class Sharing(NamedTuple):
    """How a token's output depends on other tokens."""

    why: str
    values: bool
    """Whether it changes with them at unchanged choices too."""


def declared_sharing(layer: nn.Module) -> Sharing | None:
    """What tokens share, where a part of the layer says so."""
    for module in layer.modules():
        if isinstance(module, MoE) and (module.capacity or module.assistance):
            return Sharing("the layer limits how many slots an expert takes", values=False)
        if isinstance(module, RouterDeclaration):
            if module.decides_for != "token":
                why = f"the router decides for a whole {module.decides_for}"
                return Sharing(why, values=True)
            if module.looks_ahead is not None:
                return Sharing(f"{type(module).__name__} {module.looks_ahead}", values=False)
    return None


def declared_surrogate(layer: nn.Module) -> Surrogate | None:
    """The layer's own method `surrogate`, or that of its estimator."""
    if isinstance(layer, MoE):
        return _of_estimator if _replaces(layer) else None
    if isinstance(layer, WithAttachedLoss) and isinstance(layer.moe, MoE):
        return _of_attached
    method = getattr(type(layer), "surrogate", None)
    return method if callable(method) else None


def _replaces(moe: MoE) -> bool:
    return type(moe.estimator).surrogate is not Estimator.surrogate


def _of_estimator(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, MoE)
    state = torch.get_rng_state()
    y = EstimatorSurrogate(layer, x.detach().flatten(0, -2), None)(layer, x.flatten(0, -2), None)
    torch.set_rng_state(state)  # the loss is that of the same draws
    return y.reshape(x.shape), layer(x).aux_loss


def _of_attached(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, WithAttachedLoss)
    assert isinstance(layer.moe, MoE)
    surrogate = _of_estimator if _replaces(layer.moe) else _called
    y, aux_loss = surrogate(layer.moe, x)
    return y, layer.scale * aux_loss


def _called(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    output = layer(x)
    return output.hidden_states, output.aux_loss
