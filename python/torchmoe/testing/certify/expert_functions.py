"""One expert of a layer as a function of one token, if its parameters have a usual layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch.nn.functional as F  # noqa: N812 (torch's own abbreviation)
from torch import Tensor, nn

from torchmoe.adapter import Adapter

ExpertFunction = Callable[[int, Tensor], Tensor]

_GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "reglu": F.relu,
}


def expert_function(layer: nn.Module, adapter: Adapter) -> ExpertFunction | None:
    """(i, x [H]) -> E_i(x) [H], in torch's own ops on the layer's own parameters.

    Known are lists of modules, and matrices for all experts, gate_up_proj [E, 2 I, H] or
    [E, H, 2 I] with down_proj, as Transformers and this package lay them out.
    """
    path = adapter.experts_path(layer)
    if path is None:
        return None
    experts = layer.get_submodule(path)
    listed = experts if isinstance(experts, nn.ModuleList) else _inner_list(experts)
    if listed is not None:
        return lambda number, x: _only(listed[number](x.unsqueeze(0)))
    if isinstance(getattr(experts, "gate_up_proj", None), nn.Parameter):
        return _fused(experts)
    return None


def shared_function(layer: nn.Module, adapter: Adapter) -> Callable[[Tensor], Tensor] | None:
    """What every token [T, H] is served by, None where there is none."""
    path = adapter.shared_path(layer)
    return None if path is None else layer.get_submodule(path)


def _inner_list(experts: nn.Module) -> nn.ModuleList | None:
    lists = [child for child in experts.children() if isinstance(child, nn.ModuleList)]
    return lists[0] if len(lists) == 1 and not list(experts.parameters(recurse=False)) else None


def _fused(experts: nn.Module) -> ExpertFunction | None:
    gate_up, down = experts.gate_up_proj, getattr(experts, "down_proj", None)
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor):
        return None
    activate = _activation(experts)
    if activate is None:
        return None

    def expert(number: int, x: Tensor) -> Tensor:
        inner = activate(_product(experts, "gate_up_proj", number, x))
        return _product(experts, "down_proj", number, inner)

    return expert


def _product(experts: nn.Module, name: str, number: int, x: Tensor) -> Tensor:
    matrix: Tensor = getattr(experts, name)[number]
    bias: Tensor | None = getattr(experts, f"{name}_bias", None)
    product = matrix @ x if matrix.shape[-1] == len(x) else x @ matrix
    return product if bias is None else product + bias[number]


def _activation(experts: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """[2 I] -> [I]."""
    whole = getattr(experts, "_apply_gate", None)
    if callable(whole):
        return cast(Callable[[Tensor], Tensor], whole)
    act = getattr(experts, "act_fn", None) or _GATED.get(str(getattr(experts, "activation", "")))
    if act is None:
        return None

    def gated(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        activated: Tensor = act(gate) * up
        return activated

    return gated


def _only(rows: Tensor) -> Tensor:
    return rows.squeeze(0)
