"""expert_mlp: gather, experts and combine in one op."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import reference
import torchmoe
from gradient_harness import GRADCHECK, DifferentiableOpTests
from op_case import (
    Autocast,
    ErrorCase,
    Inputs,
    OpCase,
    altered,
    assert_close,
    call,
    cotangents,
    leaves,
    run,
    tolerance,
    wide_dtype,
)
from situations import EXPERT_WEIGHTS, SITUATIONS, Situation, expert_weights, normal

# Settings of gated activations as models have them, and all at once; none has a bend where rounding
# a pre-activation to 16 bits could carry it to the other side.
SMOOTH: Inputs = {"alpha": 0.75, "up_offset": -0.5, "gate_softcap": 3.0, "up_softcap": 2.5}
GPT_OSS: Inputs = {"alpha": 1.702, "limit": 1.0, "up_offset": 1.0, "interleaved": True}
SHAPED = (
    {"limit": 0.8},
    {"gate_softcap": 4.0, "up_softcap": 25.0},
    {"interleaved": True},
    GPT_OSS,
    SMOOTH,
    SMOOTH | {"limit": 1.2, "interleaved": True},
)


def in_columns(matrices: Tensor) -> Tensor:
    """[E, out, in] that lies in memory as [E, in, out]."""
    return matrices.mT.contiguous().mT


def make(
    s: Situation,
    dtype: torch.dtype,
    activation: str,
    bias: bool,
    *,
    transposed: bool = False,
    **shaped: float | bool,
) -> Inputs:
    parameters = expert_weights(s, dtype, activation, bias)
    if transposed:
        for name in ("w_in", "w_out"):
            parameters[name] = in_columns(parameters[name])
    return {
        "x": normal(s.T, s.H, dtype=dtype),
        "indices": s.indices(),
        "weights": normal(s.T, s.K, dtype=wide_dtype(dtype)),
        **parameters,
        "activation": activation,
        **shaped,
    }


def private(inputs: Inputs) -> list[tuple[str, Inputs]]:
    plan = reference.dispatch_plan(inputs["indices"], len(inputs["w_in"]))
    names = dict(zip(("expert_offsets", "row_to_slot", "slot_to_row"), plan, strict=True))
    rest = {k: v for k, v in inputs.items() if k != "indices"} | names
    _, pre = call("_expert_mlp", rest | {"save_pre": True})
    biased = inputs["b_in"] is not None
    backward = rest | {
        "grad": normal(*inputs["x"].shape, dtype=inputs["x"].dtype),
        "pre": pre,
    }
    masks = [[True, True, True, biased, True, biased], [False, True, False, False, False, False]]
    return [
        ("_expert_mlp", rest | {"save_pre": True}),
        ("_expert_mlp", rest | {"save_pre": False}),
        ("_expert_mlp", rest | {"save_pre": True, "wide": True}),
        *(("_expert_mlp_backward", backward | {"output_mask": mask}) for mask in masks),
        ("_expert_mlp_backward", backward | {"output_mask": masks[0], "wide": True}),
    ]


def poison(inputs: Inputs) -> Inputs:
    unrouted = (inputs["indices"] < 0) | (inputs["indices"] >= len(inputs["w_in"]))
    return inputs | {
        "weights": inputs["weights"].masked_fill(unrouted, torch.nan),
        "x": inputs["x"].masked_fill(unrouted.all(1, keepdim=True), torch.nan),
    }


def _spread(tensor: Tensor) -> Tensor:
    """The same numbers, no two of them next to each other."""
    wide = tensor.new_zeros(*tensor.shape, 2)
    wide[..., 0] = tensor
    return wide[..., 0]


def _part(tensor: Tensor) -> Tensor:
    """The same numbers within a larger tensor."""
    larger = tensor.new_zeros([size + 3 for size in tensor.shape])
    inside = larger[tuple(slice(1, 1 + size) for size in tensor.shape)]
    inside.copy_(tensor)
    return inside


class TestExpertMlp(DifferentiableOpTests):
    case = OpCase(
        name="expert_mlp",
        schema=(
            "expert_mlp(Tensor x, Tensor indices, Tensor weights, Tensor w_in, Tensor? b_in, "
            "Tensor w_out, Tensor? b_out, str activation, *, float alpha=1., float? limit=None, "
            "float up_offset=0., float? gate_softcap=None, float? up_softcap=None, "
            "bool interleaved=False) -> Tensor"
        ),
        make=make,
        reference=reference.expert_mlp,
        wrapper=lambda inputs: torchmoe.ops.expert_mlp(**inputs),
        variants=(
            {"activation": "swiglu", "bias": True},
            {"activation": "gelu", "bias": False},
            {
                "activation": "swiglu",
                "bias": True,
                "transposed": True,
                "interleaved": True,
                **SMOOTH,
            },
        ),
        differentiable=("x", "weights", *EXPERT_WEIGHTS),
        asked_as=("dispatch_plan", "_expert_mlp"),
        # What the products read is in the storage type: the activation and, backward, the saved
        # pre-activation, from which both the slope and the value come, and its gradient.
        roundings=1,
        gradient_roundings=3,
        token_input="x",
        private=private,
        poison=poison,
        autocast=Autocast(torch.bfloat16, ("x", *EXPERT_WEIGHTS)),
        errors=(
            ErrorCase("x", altered("x", lambda x: x[0]), r"\[5\]"),
            ErrorCase("x", altered("x", lambda x: x.int()), "Int"),
            ErrorCase("indices", altered("indices", lambda i: i[0]), r"\[2\]"),
            ErrorCase("indices", altered("indices", lambda i: i[1:]), r"\[5, 2\]"),
            ErrorCase("indices", altered("indices", lambda i: i.int()), "Int"),
            ErrorCase("weights", altered("weights", lambda w: w[:, 1:]), r"\[6, 1\]"),
            ErrorCase("weights", altered("weights", lambda w: w.half()), "Half"),
            ErrorCase("weights", altered("weights", lambda w: w.long()), "Long"),
            ErrorCase("w_in", altered("w_in", lambda w: w[0]), r"\[6, 5\]"),
            ErrorCase("w_in", altered("w_in", lambda w: w[:, 1:]), r"\[4, 5, 5\]"),
            ErrorCase("w_in", altered("w_in", lambda w: w[:, :3]), r"\[4, 3, 5\]"),
            ErrorCase("w_in", altered("w_in", lambda w: w[1:]), r"\[3, 6, 5\]"),
            ErrorCase("w_out", altered("w_in", lambda w: w.double()), "Float"),
            ErrorCase("b_in", altered("b_in", lambda b: b[:, 1:]), r"\[4, 5\]"),
            ErrorCase("b_in", altered("b_in", lambda b: b.double()), "Double"),
            ErrorCase("w_out", altered("w_out", lambda w: w[0]), r"\[5, 3\]"),
            ErrorCase("w_out", altered("w_out", lambda w: w[:, 1:]), r"\[4, 4, 3\]"),
            ErrorCase("w_out", altered("w_out", lambda w: w.double()), "Double"),
            ErrorCase("b_out", altered("b_out", lambda b: b[:, 1:]), r"\[4, 4\]"),
            ErrorCase("b_out", altered("b_out", lambda b: b.double()), "Double"),
            ErrorCase("activation", altered("activation", lambda a: "mish"), '"mish"', ValueError),
            ErrorCase("alpha", lambda given: given | {"alpha": 0.0}, "0", ValueError),
            ErrorCase("alpha", lambda given: given | {"alpha": math.inf}, "inf", ValueError),
            ErrorCase("limit", lambda given: given | {"limit": -1.0}, "-1", ValueError),
            ErrorCase("limit", lambda given: given | {"limit": math.nan}, "nan", ValueError),
            ErrorCase(
                "up_offset", lambda given: given | {"up_offset": math.nan}, "nan", ValueError
            ),
            ErrorCase("gate_softcap", lambda given: given | {"gate_softcap": 0.0}, "0", ValueError),
            ErrorCase("up_softcap", lambda given: given | {"up_softcap": -2.0}, "-2", ValueError),
        ),
    )

    @pytest.mark.usefixtures("one_thread")
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("activation", torchmoe.ops.ACTIVATIONS)
    def test_every_activation(self, activation: str, bias: bool) -> None:
        case = self.case
        inputs = make(SITUATIONS["dropped"], torch.float64, activation, bias)
        (actual,), (expected,) = case(inputs), case.expect(inputs)
        n = SITUATIONS["dropped"].longest
        atol = tolerance(expected, n=n, wide=torch.float64, stored=torch.float64)
        assert_close(actual, expected, atol)
        names = case.names(inputs)
        inputs = leaves(inputs, names)
        function, values = self._of(inputs, names), [inputs[n] for n in names]
        assert torch.autograd.gradcheck(
            function, values, check_forward_ad=True, fast_mode=True, **GRADCHECK
        )
        assert torch.autograd.gradgradcheck(
            function, values, check_fwd_over_rev=True, fast_mode=True, **GRADCHECK
        )

    @pytest.mark.parametrize("activation", torchmoe.ops.ACTIVATIONS)
    def test_every_activation_in_single_precision(self, activation: str) -> None:
        """Where vectors are at work."""
        variant = {"activation": activation, "bias": True}
        self.test_gradients_are_the_reference(SITUATIONS["dropped"], torch.float32, variant)
        self.test_forward_is_the_reference(SITUATIONS["dropped"], torch.float32, variant)

    @pytest.mark.usefixtures("one_thread")
    @pytest.mark.parametrize("shaped", SHAPED, ids=lambda shaped: "-".join(shaped))
    @pytest.mark.parametrize("activation", torchmoe.ops.GATED_ACTIVATIONS)
    def test_what_gated_ones_do_besides(self, activation: str, shaped: Inputs) -> None:
        """Against the reference and against differences; both orders and directions."""
        for dtype in (torch.float64, torch.float32):
            variant = {"activation": activation, "bias": True, **shaped}
            self.test_forward_is_the_reference(SITUATIONS["dropped"], dtype, variant)
            self.test_gradients_are_the_reference(SITUATIONS["dropped"], dtype, variant)
        inputs = make(SITUATIONS["dropped"], torch.float64, activation, bias=True, **shaped)
        names = self.case.names(inputs)
        inputs = leaves(inputs, names)
        function, values = self._of(inputs, names), [inputs[n] for n in names]
        assert torch.autograd.gradcheck(
            function, values, check_forward_ad=True, fast_mode=True, **GRADCHECK
        )
        assert torch.autograd.gradgradcheck(
            function, values, check_fwd_over_rev=True, fast_mode=True, **GRADCHECK
        )

    @pytest.mark.parametrize(
        "setting",
        [{"alpha": 2.0}, {"limit": 1.0}, {"up_offset": 1.0}, {"gate_softcap": 1.0},
         {"up_softcap": 1.0}, {"interleaved": True}],
        ids=lambda setting: next(iter(setting)),
    )  # fmt: skip
    def test_a_plain_activation_has_no_settings(self, setting: Inputs) -> None:
        inputs = make(SITUATIONS["plain"], torch.float32, "silu", bias=True, **setting)
        with pytest.raises(
            ValueError, match=r'expert_mlp: activation must be a gated one .*"silu"'
        ):
            self.case(inputs)

    @pytest.mark.parametrize("interleaved", [False, True])
    @pytest.mark.parametrize(
        ("hidden", "inner", "tokens"),
        [(24, 40, 300), (16, 16, 40), (1, 8, 9), (8, 1, 9), (1, 1, 3), (33, 17, 70), (64, 300, 5)],
    )
    def test_either_orientation_gives_the_same_bits(
        self, dtype: torch.dtype, hidden: int, inner: int, tokens: int, interleaved: bool
    ) -> None:
        """Square and narrow ones too: the strides say what the shape does not."""
        situation = Situation("oriented", T=tokens, H=hidden, I=inner, E=3, K=2)
        rows = make(situation, dtype, "swiglu", bias=True, interleaved=interleaved)
        columns = rows | {name: in_columns(rows[name]) for name in ("w_in", "w_out")}
        names = self.case.names(rows)
        (y,), grads = run(self.case, rows, names)
        leaf = leaves(columns, names)
        for name in ("w_in", "w_out"):  # a leaf that lies as a model's parameter does
            leaf[name] = columns[name].mT.contiguous().detach().requires_grad_()
        given = leaf | {name: leaf[name].mT for name in ("w_in", "w_out")}
        (other,) = self.case(given)
        assert torch.equal(other, y)
        torch.autograd.backward(other, cotangents((other,))[0])
        for name, grad in zip(names, grads, strict=True):
            found = leaf[name].grad
            assert found is not None
            if name in ("w_in", "w_out"):
                assert found.is_contiguous()
                found = found.mT
            assert torch.equal(found, grad), name

    def test_a_gradient_lies_as_its_matrix_does(self) -> None:
        inputs = make(SITUATIONS["plain"], torch.float32, "swiglu", bias=True, transposed=True)
        op, given = private(inputs)[3]
        assert op == "_expert_mlp_backward"
        _, _, grad_w_in, _, grad_w_out, _ = call(op, given)
        assert grad_w_in.stride() == inputs["w_in"].stride()
        assert grad_w_out.stride() == inputs["w_out"].stride()

    def test_matrices_that_are_neither_are_copied(self) -> None:
        inputs = make(SITUATIONS["dropped"], torch.float64, "swiglu", bias=True)
        spread = {name: _spread(inputs[name]) for name in EXPERT_WEIGHTS}
        part = {name: _part(inputs[name]) for name in EXPERT_WEIGHTS}
        names = self.case.names(inputs)
        expected = run(self.case, inputs, names)
        for other in (spread, part):
            (y,), grads = run(self.case, inputs | other, names)
            assert torch.equal(y, expected[0][0])
            assert all(torch.equal(g, e) for g, e in zip(grads, expected[1], strict=True))

    @pytest.mark.parametrize(
        "experts", [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    )
    @pytest.mark.parametrize(
        "tokens", [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    )
    def test_tokens_of_another_type(self, tokens: torch.dtype, experts: torch.dtype) -> None:
        """As if they had the experts' type, the sums rounded to their own instead."""
        inputs = make(SITUATIONS["dropped"], experts, "swiglu", bias=True)
        inputs["weights"] = inputs["weights"].to(torch.float64)
        wide = wide_dtype(experts)
        mixed = inputs | {"x": inputs["x"].to(tokens)}
        same = inputs | {"x": mixed["x"].to(experts)}
        given = dict(private(same))
        y, _ = call("_expert_mlp", given["_expert_mlp"])
        assert y.dtype == wide
        (actual,), grads = run(self.case, mixed, self.case.names(mixed))
        assert actual.dtype == tokens
        assert torch.equal(actual, y.to(tokens))
        for name, grad in zip(self.case.names(mixed), grads, strict=True):
            assert grad.dtype == mixed[name].dtype
        backward = given["_expert_mlp_backward"] | {"grad": cotangents((actual,))[0].to(experts)}
        expected = call("_expert_mlp_backward", backward)
        assert torch.equal(grads[0], expected[0].to(tokens))
        assert all(torch.equal(g, e) for g, e in zip(grads[1:], expected[1:], strict=True))

    @pytest.mark.usefixtures("one_thread")
    @pytest.mark.parametrize(
        ("tokens", "experts"), [(torch.float64, torch.float32), (torch.float32, torch.float64)]
    )
    def test_derivatives_for_tokens_of_another_type(
        self, tokens: torch.dtype, experts: torch.dtype
    ) -> None:
        """Tangents and second gradients, against those of tokens of the experts' type."""
        inputs = make(SITUATIONS["dropped"], experts, "swiglu", bias=True)
        inputs["weights"] = inputs["weights"].double()
        x = inputs["x"].to(torch.float32)
        tangent = normal(*x.shape, dtype=torch.float32)

        def derivatives(dtype: torch.dtype) -> list[Tensor]:
            def op(x: Tensor) -> Tensor:
                return self.case(inputs | {"x": x})[0]

            value, along = torch.func.jvp(op, (x.to(dtype),), (tangent.to(dtype),))
            leaf = x.to(dtype).requires_grad_()
            (first,) = torch.autograd.grad(op(leaf).square().sum(), leaf, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), leaf)
            return [value, along, first.detach(), second]

        for actual, expected in zip(derivatives(tokens), derivatives(experts), strict=True):
            assert actual.dtype == tokens
            atol = tolerance(expected, n=40, wide=torch.float32, stored=torch.float32)
            assert_close(actual.double(), expected.double(), atol)

    def test_what_is_saved_does_not_depend_on_the_routing(self) -> None:
        """Checkpointing compares what a recomputation saves with what was saved before."""

        def shapes(indices: Tensor) -> list[torch.Size]:
            inputs = make(SITUATIONS["plain"], torch.float32, "swiglu", bias=True)
            inputs = leaves(inputs | {"indices": indices}, self.case.names(inputs))
            saved: list[torch.Size] = []

            def pack(tensor: Tensor) -> Tensor:
                saved.append(tensor.shape)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                self.case(inputs)
            return saved

        indices = SITUATIONS["plain"].indices()
        choices = [indices, torch.zeros_like(indices), torch.full_like(indices, -1)]
        assert len({tuple(shapes(choice)) for choice in choices}) == 1

    def test_every_activation_has_a_formula(self) -> None:
        assert tuple(reference.PLAIN) == torchmoe.ops.PLAIN_ACTIVATIONS
        assert tuple(reference.GATED) == torchmoe.ops.GATED_ACTIVATIONS

    @pytest.mark.usefixtures("one_thread")
    @pytest.mark.parametrize("which", ["b_in", "b_out"])
    def test_one_bias_without_the_other(self, which: str) -> None:
        """An absent optional shifts what needs a gradient; each subset must land in its place."""
        inputs = make(SITUATIONS["dropped"], torch.float64, "silu", bias=True) | {which: None}
        for names in [(name,) for name in self.case.names(inputs)] + [self.case.names(inputs)]:
            leaf = leaves(inputs, names)
            assert torch.autograd.gradcheck(
                lambda *v, leaf=leaf, names=names: self.case(
                    leaf | dict(zip(names, v, strict=True))
                ),
                [leaf[n] for n in names],
                **GRADCHECK,
            )

    @pytest.mark.parametrize("own", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("wide", [torch.float32, torch.float64, None])
    def test_types_of_weights(self, own: torch.dtype, wide: torch.dtype | None) -> None:
        inputs = make(SITUATIONS["dropped"], own, "swiglu", bias=True)
        inputs["weights"] = inputs["weights"].to(wide or own)
        (y,), grads = run(self.case, inputs, self.case.names(inputs))
        (expected,) = self.case.expect(inputs)
        atol = tolerance(expected, n=12, wide=torch.float32, stored=own)
        assert y.dtype == own
        assert_close(y, expected, atol)
        for name, grad in zip(self.case.names(inputs), grads, strict=True):
            assert grad.dtype == inputs[name].dtype

    def test_the_bias_of_dropped_slots_adds_nothing(self) -> None:
        inputs = make(SITUATIONS["all_dropped"], torch.float32, "gelu", bias=True)
        (y,), grads = run(self.case, inputs, self.case.names(inputs))
        assert bool((y == 0).all())
        assert all(bool((grad == 0).all()) for grad in grads)

    def test_gradients_of_dropped_slots_are_exactly_zero(self) -> None:
        inputs = make(SITUATIONS["dropped"], torch.float32, "swiglu", bias=True)
        _, grads = run(self.case, inputs, ("x", "weights"))
        dropped = inputs["indices"] < 0
        assert bool((grads[1][dropped] == 0).all())
        assert bool((grads[1][~dropped] != 0).all())
        assert bool((grads[0][dropped.all(1)] == 0).all())
        assert bool((grads[0][~dropped.all(1)] != 0).all())

    def test_a_gradient_at_unrouted_tokens_does_not_leak(self) -> None:
        inputs = make(SITUATIONS["dropped"], torch.float32, "swiglu", bias=True)
        names = self.case.names(inputs)
        leaf = leaves(inputs, names)
        values = [leaf[n] for n in names]
        (y,) = self.case(leaf)
        clean = torch.ones_like(y)
        spoiled = clean.masked_fill((inputs["indices"] < 0).all(1, keepdim=True), torch.nan)
        expected = torch.autograd.grad(y, values, clean, retain_graph=True)
        actual = torch.autograd.grad(y, values, spoiled)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))

    def test_an_idle_expert_has_a_dense_gradient_of_zeros(self) -> None:
        inputs = make(SITUATIONS["empty_expert"], torch.float32, "swiglu", bias=True)
        _, grads = run(self.case, inputs, EXPERT_WEIGHTS)
        for grad in grads:
            assert (grad == 0).flatten(1).all(1).tolist() == [False, True, False, False]

    @pytest.mark.parametrize("activation", ["swiglu", "gelu"])
    def test_saves_nothing_of_rows_times_hidden_size(self, activation: str) -> None:
        """For backward: x, the pre-activation, weights, integers and the parameters."""
        situation = Situation("memory", T=16, H=11, I=3, E=5, K=3)
        inputs = make(situation, torch.float32, activation, bias=True)
        inputs = leaves(inputs, self.case.names(inputs))
        saved: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.case(inputs)
        given = {v.data_ptr() for v in inputs.values() if isinstance(v, Tensor)}
        own = [t for t in saved if t.data_ptr() not in given]
        floating = [t.shape for t in own if t.is_floating_point()]
        width = inputs["w_in"].size(1)
        assert floating == [(16 * 3, width)]
        assert sum(t.numel() for t in own if not t.is_floating_point()) <= 6 + 3 * 16 * 3

    @pytest.mark.parametrize("activation", torchmoe.ops.ACTIVATIONS)
    def test_nan_stays_nan_and_in_its_token(self, activation: str) -> None:
        inputs = make(SITUATIONS["plain"], torch.float32, activation, bias=True)
        inputs["x"][1] = torch.nan
        (y,) = self.case(inputs)
        assert bool(y[1].isnan().all())
        assert not bool(y[torch.arange(len(y)) != 1].isnan().any())

    @pytest.mark.parametrize("grad_mode", [False, True])
    def test_keeps_the_pre_activation_only_for_a_backward(self, grad_mode: bool) -> None:
        inputs = make(SITUATIONS["plain"], torch.float32, "swiglu", bias=True)
        inputs = leaves(inputs, self.case.names(inputs) if not grad_mode else ())
        called: list[object] = []

        class Observe(TorchDispatchMode):
            def __torch_dispatch__(self, op, types, args=(), kwargs=None):
                called.append(op)
                return op(*args, **(kwargs or {}))

        ops = torch.ops.torchmoe
        with torch.set_grad_enabled(grad_mode), Observe():
            self.case(inputs)
        assert called == [ops.expert_mlp.default]  # whose kernel asks for none
        with Observe():
            self.case(leaves(inputs, self.case.names(inputs)))
        assert ops._expert_mlp.default in called

    def test_wide_results_are_what_is_rounded(self, dtype: torch.dtype) -> None:
        inputs = make(SITUATIONS["dropped"], dtype, "swiglu", bias=True)
        plain = dict(private(inputs))  # the last of each name: with `wide`
        for op, position in (("_expert_mlp", 0), ("_expert_mlp_backward", 0)):
            narrow, wide = call(op, plain[op] | {"wide": False}), call(op, plain[op])
            assert wide[position].dtype == wide_dtype(dtype)
            assert narrow[position].dtype == dtype
            assert torch.equal(wide[position].to(dtype), narrow[position])
            is_exact = torch.equal(wide[position], narrow[position].to(wide_dtype(dtype)))
            assert is_exact == (dtype == wide_dtype(dtype))
            for w, n in zip(wide[1:], narrow[1:], strict=True):
                assert w.dtype == n.dtype
                assert torch.equal(w, n)

    def test_the_pieces_give_the_same(self) -> None:
        """Permute, grouped_linear and unpermute, the way to second derivatives."""
        inputs = make(SITUATIONS["dropped"], torch.float64, "silu", bias=True)
        ops = torchmoe.ops

        def pieces(inputs: Inputs) -> tuple[Tensor, ...]:
            plan = ops.dispatch_plan(inputs["indices"], len(inputs["w_in"]))
            offsets = plan.expert_offsets
            rows = ops.permute(inputs["x"], plan)
            rows = ops.grouped_linear(rows, inputs["w_in"], inputs["b_in"], offsets)
            rows = torch.nn.functional.silu(rows)
            rows = ops.grouped_linear(rows, inputs["w_out"], inputs["b_out"], offsets)
            return (ops.unpermute(rows, inputs["weights"], plan),)

        names = self.case.names(inputs)
        fused, split = run(self.case, inputs, names), run(pieces, inputs, names)
        for a, e in zip(fused[0] + fused[1], split[0] + split[1], strict=True):
            assert_close(a, e, tolerance(e, n=12, wide=torch.float64, stored=torch.float64))

    def test_shapes_past_2_to_the_31_elements(self) -> None:
        def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty(
                shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point
            )

        x = on_meta(2**20, 2**12)
        y = torchmoe.ops.expert_mlp(
            x,
            on_meta(2**20, 2, dtype=torch.int64),
            on_meta(2**20, 2, dtype=torch.float32),
            on_meta(8, 2**13, 2**12),
            None,
            on_meta(8, 2**12, 2**12),
            None,
            "swiglu",
        )
        (grad,) = torch.autograd.grad(y, x, torch.empty_like(y))
        assert y.shape == grad.shape == (2**20, 2**12)
