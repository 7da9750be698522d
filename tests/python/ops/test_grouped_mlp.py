"""grouped_mlp: each expert's network on its own rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import reference
import torchmoe
from gradient_harness import DifferentiableOpTests
from op_case import Autocast, ErrorCase, Inputs, OpCase, altered, run
from situations import EXPERT_WEIGHTS, SITUATIONS, Situation, expert_weights, normal

SHAPED: Inputs = {"alpha": 0.75, "up_offset": -0.5, "gate_softcap": 3.0, "up_softcap": 2.5}


def make(
    s: Situation, dtype: torch.dtype, activation: str, bias: bool, **shaped: float | bool
) -> Inputs:
    return {
        "rows": normal(s.T * s.K, s.H, dtype=dtype),
        **expert_weights(s, dtype, activation, bias),
        "expert_offsets": s.plan()["expert_offsets"],
        "activation": activation,
        **shaped,
    }


def expected(
    rows: Tensor, expert_offsets: Tensor, **experts: Tensor | str | float | None
) -> Tensor:
    """A row is a token of one choice, the expert whose row it is."""
    places = torch.arange(len(rows))
    owner = torch.bucketize(places, expert_offsets, right=True) - 1
    owner = torch.where(places < expert_offsets[-1], owner, -1)
    return reference.expert_mlp(rows, owner[:, None], torch.ones(len(rows), 1), **experts)


def poison(inputs: Inputs) -> Inputs:
    rows = inputs["rows"].clone()
    rows[inputs["expert_offsets"][-1] :] = torch.nan
    return inputs | {"rows": rows}


class TestGroupedMlp(DifferentiableOpTests):
    case = OpCase(
        name="grouped_mlp",
        schema=(
            "grouped_mlp(Tensor rows, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, "
            "Tensor expert_offsets, str activation, *, float alpha=1., float? limit=None, "
            "float up_offset=0., float? gate_softcap=None, float? up_softcap=None, "
            "bool interleaved=False) -> Tensor"
        ),
        make=make,
        reference=expected,
        wrapper=lambda inputs: torchmoe.ops.grouped_mlp(**inputs),
        variants=(
            {"activation": "swiglu", "bias": True},
            {"activation": "gelu", "bias": False},
            {"activation": "swiglu", "bias": True, "interleaved": True, **SHAPED},
        ),
        differentiable=("rows", *EXPERT_WEIGHTS),
        asked_as=("_expert_mlp",),
        # As in expert_mlp.
        roundings=1,
        gradient_roundings=3,
        poison=poison,
        autocast=Autocast(torch.bfloat16, ("rows", *EXPERT_WEIGHTS)),
        errors=(
            ErrorCase("rows", altered("rows", lambda r: r[0]), r"\[5\]"),
            ErrorCase("rows", altered("rows", lambda r: r.int()), "Int"),
            ErrorCase("w_in", altered("w_in", lambda w: w[:, 1:]), r"\[4, 5, 5\]"),
            ErrorCase("w_out", altered("w_out", lambda w: w.double()), "Double"),
            ErrorCase("b_in", altered("b_in", lambda b: b[:, 1:]), r"\[4, 5\]"),
            ErrorCase("expert_offsets", altered("expert_offsets", lambda o: o[1:]), r"\[4\]"),
            ErrorCase("expert_offsets", altered("expert_offsets", lambda o: o[None]), r"\[1, 5\]"),
            ErrorCase("expert_offsets", altered("expert_offsets", lambda o: o.int()), "Int"),
            ErrorCase("activation", altered("activation", lambda a: "mish"), '"mish"', ValueError),
            ErrorCase("alpha", lambda given: given | {"alpha": 0.0}, "0", ValueError),
        ),
    )

    @pytest.mark.parametrize("activation", ["swiglu", "relu2"])
    def test_is_expert_mlp_without_dispatch_and_combine(
        self, dtype: torch.dtype, activation: str
    ) -> None:
        """Bit for bit where a token has one slot of weight 1, at sizes that fill several blocks."""
        situation = Situation("sorted", T=700, H=40, I=72, E=3, K=1)
        indices = situation.indices()
        weights = expert_weights(situation, dtype, activation, bias=True)
        x = normal(situation.T, situation.H, dtype=dtype)
        plan = torchmoe.ops.dispatch_plan(indices, situation.E)

        def fused(inputs: Inputs) -> tuple[Tensor, ...]:
            ones = torch.ones(indices.shape)
            return (torchmoe.ops.expert_mlp(indices=indices, weights=ones, **inputs),)

        def sorted_rows(inputs: Inputs) -> tuple[Tensor, ...]:
            rows = inputs["x"][plan.row_to_slot]
            out = torchmoe.ops.grouped_mlp(
                rows=rows,
                expert_offsets=plan.expert_offsets,
                **{k: v for k, v in inputs.items() if k != "x"},
            )
            return (out[plan.slot_to_row[:, 0]],)

        inputs = {"x": x, **weights, "activation": activation}
        names = ("x", *EXPERT_WEIGHTS)
        (y,), grads = run(fused, inputs, names)
        (other,), others = run(sorted_rows, inputs, names)
        assert torch.equal(other, y)
        assert all(torch.equal(g, e) for g, e in zip(others, grads, strict=True))

    def test_an_idle_expert_has_a_dense_gradient_of_zeros(self) -> None:
        inputs = make(SITUATIONS["empty_expert"], torch.float32, "swiglu", bias=True)
        _, grads = run(self.case, inputs, EXPERT_WEIGHTS)
        for grad in grads:
            assert (grad == 0).flatten(1).all(1).tolist() == [False, True, False, False]
