"""What `torch.utils.flop_counter.FlopCounterMode` counts for the ops.

As for torch's own ops these are the multiplications and additions of matrix products, known from
shapes alone: every slot counts as routed, and activations, biases and weighted sums do not count.

That module imports Triton where there is one. So the formulas are registered when it is imported,
not before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

import torch

_COUNTER = "torch.utils.flop_counter"

# A formula gets the op's arguments in the order of the schema, each tensor as its shape.
_Shape = Sequence[int]


def _router_logits(x: _Shape, weight: _Shape, *_: object, **__: object) -> int:
    tokens, hidden_size = x
    return 2 * tokens * hidden_size * weight[0]


def _router_logits_backward(
    grad: _Shape, x: _Shape, weight: _Shape, output_mask: Sequence[bool], **_: object
) -> int:
    return sum(output_mask[:2]) * _router_logits(x, weight)


def _grouped_linear(rows: _Shape, weight: _Shape, *_: object, **__: object) -> int:
    _num_experts, out_features, in_features = weight
    return 2 * rows[0] * out_features * in_features


def _grouped_linear_backward(
    grad: _Shape,
    rows: _Shape,
    weight: _Shape,
    expert_offsets: _Shape,
    output_mask: Sequence[bool],
    **_: object,
) -> int:
    return sum(output_mask[:2]) * _grouped_linear(rows, weight)


def _expert_mlp(
    x: _Shape,
    indices: _Shape,
    weights: _Shape,
    w_in: _Shape,
    b_in: _Shape | None,
    w_out: _Shape,
    *_: object,
    **__: object,
) -> int:
    num_slots = indices[0] * indices[1]
    return _grouped_linear((num_slots,), w_in) + _grouped_linear((num_slots,), w_out)


def _expert_mlp_forward(
    x: _Shape,
    weights: _Shape,
    w_in: _Shape,
    b_in: _Shape | None,
    w_out: _Shape,
    *_: object,
    **__: object,
) -> int:
    return _expert_mlp(x, weights, weights, w_in, b_in, w_out)


def _expert_mlp_backward(
    grad: _Shape,
    x: _Shape,
    weights: _Shape,
    w_in: _Shape,
    b_in: _Shape | None,
    w_out: _Shape,
    b_out: _Shape | None,
    expert_offsets: _Shape,
    row_to_slot: _Shape,
    slot_to_row: _Shape,
    pre: _Shape,
    output_mask: Sequence[bool],
    activation: str,
    **_: object,
) -> int:
    want_x, _want_weights, want_w_in, _want_b_in, want_w_out, _want_b_out = output_mask
    # The gradient at the activation, from which all others are formed, is always computed.
    return (want_x + want_w_in) * _grouped_linear(row_to_slot, w_in) + (
        1 + want_w_out
    ) * _grouped_linear(row_to_slot, w_out)


def _grouped_mlp(
    rows: _Shape,
    w_in: _Shape,
    b_in: _Shape | None,
    w_out: _Shape,
    *_: object,
    **__: object,
) -> int:
    return _grouped_linear(rows, w_in) + _grouped_linear(rows, w_out)


def _attach_dense_gradient_backward(
    grad: _Shape,
    x: _Shape,
    w_in: _Shape,
    b_in: _Shape | None,
    w_out: _Shape,
    *_: object,
    **__: object,
) -> int:
    # Every expert runs on every token.
    return w_in[0] * (_grouped_linear(x, w_in) + _grouped_linear(x, w_out))


_FORMULAS: dict[str, Callable[..., int]] = {
    "router_logits": _router_logits,
    "_router_logits_backward": _router_logits_backward,
    "grouped_linear": _grouped_linear,
    "_grouped_linear_backward": _grouped_linear_backward,
    "expert_mlp": _expert_mlp,
    "_expert_mlp": _expert_mlp_forward,
    "grouped_mlp": _grouped_mlp,
    "_expert_mlp_backward": _expert_mlp_backward,
    "_attach_dense_gradient_backward": _attach_dense_gradient_backward,
}


def _add_to(counter: ModuleType) -> None:
    for name, formula in _FORMULAS.items():
        op = getattr(torch.ops.torchmoe, name)
        if op not in counter.flop_registry:
            counter.register_flop_formula(op)(formula)


class _AfterImport(MetaPathFinder):
    """Finds torch's counter module, and adds the formulas once it has been loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            _add_to(module)

        spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Adds the formulas to torch's counter, now or when it is imported."""
    if _COUNTER in sys.modules:
        _add_to(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _AfterImport())
