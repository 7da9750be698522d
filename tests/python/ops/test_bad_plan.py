"""A plan is data: one that no dispatch_plan would return gives a defined result, never a crash."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from op_case import Inputs, bind, call, run
from situations import INT64_MAX, INT64_MIN, SITUATIONS, normal

SITUATION = SITUATIONS["dropped"]
ROWS = SITUATION.T * SITUATION.K


def filled(value: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


BAD = {
    "offsets_past_the_rows": ("expert_offsets", lambda o: o + ROWS),
    "offsets_far_past_the_rows": ("expert_offsets", filled(INT64_MAX)),
    "offsets_negative": ("expert_offsets", lambda o: o - 3),
    "offsets_most_negative": ("expert_offsets", filled(INT64_MIN)),
    "offsets_descending": ("expert_offsets", lambda o: o.flip(0)),
    "offsets_not_from_zero": ("expert_offsets", lambda o: o.clamp(min=2)),
    "slots_past_the_end": ("row_to_slot", lambda r: r + ROWS),
    "slots_negative": ("row_to_slot", lambda r: r - ROWS),
    "slots_extreme": ("row_to_slot", lambda r: torch.where(r % 2 == 0, INT64_MAX, INT64_MIN)),
    "slots_all_equal": ("row_to_slot", filled(1)),
    "rows_past_the_end": ("slot_to_row", lambda s: s + ROWS),
    "rows_negative": ("slot_to_row", lambda s: s - ROWS),
    "rows_extreme": ("slot_to_row", lambda s: torch.where(s % 2 == 0, INT64_MAX, INT64_MIN)),
    "rows_all_equal": ("slot_to_row", filled(1)),
}


def inputs_of(op: str) -> tuple[Inputs, tuple[str, ...]]:
    """Inputs with a good plan, and the differentiable ones."""
    s, plan = SITUATION, SITUATION.plan()
    x = normal(s.T, s.H, dtype=torch.float32)
    rows = normal(ROWS, s.H, dtype=torch.float32)
    weights = normal(s.T, s.K, dtype=torch.float32)
    w_in = normal(s.E, 2 * s.I, s.H, dtype=torch.float32)
    w_out = normal(s.E, s.H, s.I, dtype=torch.float32)
    mlp = {"x": x, "weights": weights, "w_in": w_in, "w_out": w_out}
    mlp |= {"b_in": None, "b_out": None}
    mlp |= plan | {"activation": "swiglu"}
    inputs: dict[str, tuple[Inputs, tuple[str, ...]]] = {
        "permute": ({"x": x, **plan}, ("x",)),
        "unpermute": ({"rows": rows, "weights": weights, **plan}, ("rows", "weights")),
        "grouped_linear": (
            {
                "rows": rows,
                "weight": w_in,
                "bias": w_in[:, :, 0],
                "expert_offsets": plan["expert_offsets"],
            },
            ("rows", "weight", "bias"),
        ),
        "_expert_mlp": (mlp | {"b_in": w_in[:, :, 0], "save_pre": True}, ()),
        "_expert_mlp_backward": (
            mlp
            | {
                "grad": x,
                "pre": normal(ROWS, 2 * s.I, dtype=torch.float32),
                "output_mask": [True] * 6,
            },
            (),
        ),
    }
    return inputs[op]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "op", ["permute", "unpermute", "grouped_linear", "_expert_mlp", "_expert_mlp_backward"]
)
def test_a_bad_plan_gives_a_defined_result(op: str, bad: str) -> None:
    inputs, names = inputs_of(op)
    good = call(op, inputs)
    name, change = BAD[bad]
    if name not in inputs:
        return
    inputs = inputs | {name: change(inputs[name])}
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        outputs, grads = run(bind(op, inputs), inputs, names)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [y.shape for y in outputs] == [y.shape for y in good]
    assert all(bool(t.isfinite().all()) for t in (*outputs, *grads))
