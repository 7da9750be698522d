"""The rest of the checklist, for an op with a gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from op_case import (
    Inputs,
    Outputs,
    assert_close,
    assert_same,
    by_position,
    cotangents,
    expected_gradients,
    id_names,
    leaves,
    map_tensors,
    overload,
    run,
    strided,
    tolerance,
    wide_dtype,
)
from op_harness import OpTests
from selectively import selectively
from situations import BLOCKS, COMPILED_TOKENS, GRADIENT, SITUATIONS, Situation

# In float64 a central difference over steps of 1e-6 errs by some 1e-12 (the step squared) plus
# 1e-10 (rounding over the step); the default tolerances would let a wrong fourth digit pass.
GRADCHECK = {"atol": 1e-6, "rtol": 1e-6}


class DifferentiableOpTests(OpTests):
    """What an op with a gradient keeps besides."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        super().pytest_generate_tests(metafunc)
        case = self.case
        if "checked" in metafunc.fixturenames:
            situations = [SITUATIONS[n] for n in GRADIENT if n in case.situations]
            chosen = [
                (situation, variant, names)
                for i, variant in enumerate(case.variants)
                for situation in situations
                for names in self._subsets(variant, every=i == 0)
            ]
            ids = [f"{s.name}-{id_names([v])[0]}-{'+'.join(names)}" for s, v, names in chosen]
            metafunc.parametrize("checked", chosen, ids=ids)

    def _subsets(self, variant: Inputs, *, every: bool) -> list[tuple[str, ...]]:
        """Each differentiable input alone, and all together (only that unless `every`)."""
        inputs = self.case.make(SITUATIONS["plain"], torch.float64, **variant)
        names = self.case.names(inputs)
        alone = [(name,) for name in names] if every and len(names) > 1 else []
        return [*alone, names] if names else []

    def test_gradients_are_the_reference(
        self, situation: Situation, dtype: torch.dtype, variant: Inputs
    ) -> None:
        case = self.case
        inputs = case.make(situation, dtype, **variant)
        names = case.names(inputs)
        _, grads = run(case, inputs, names)
        for name, actual, expected in zip(
            names, grads, expected_gradients(case, inputs, names), strict=True
        ):
            assert actual.dtype == inputs[name].dtype
            assert actual.shape == inputs[name].shape
            atol = tolerance(
                expected,
                n=situation.longest,
                wide=wide_dtype(dtype),
                stored=dtype,
                roundings=case.gradient_roundings,
            )
            assert_close(actual, expected, atol)

    def test_more_than_one_block(self, variant: Inputs) -> None:
        self.test_forward_is_the_reference(BLOCKS, torch.float64, variant)
        self.test_gradients_are_the_reference(BLOCKS, torch.float64, variant)

    @pytest.mark.above_kernels
    @pytest.mark.usefixtures("one_thread")
    def test_gradcheck(self, checked: tuple[Situation, Inputs, tuple[str, ...]]) -> None:
        situation, variant, names = checked
        inputs = leaves(self.case.make(situation, torch.float64, **variant), names)
        if not self.case.names(inputs) or not self.case.is_derivative(inputs):
            pytest.skip("no derivative to check")
        assert torch.autograd.gradcheck(
            self._of(inputs, names),
            [inputs[n] for n in names],
            check_forward_ad=True,
            check_batched_grad=True,
            **GRADCHECK,
        )

    @pytest.mark.above_kernels
    @pytest.mark.usefixtures("one_thread")
    def test_double_backward(self, checked: tuple[Situation, Inputs, tuple[str, ...]]) -> None:
        """Reverse over reverse, and forward over reverse."""
        situation, variant, names = checked
        inputs = leaves(self.case.make(situation, torch.float64, **variant), names)
        if not self.case.names(inputs):
            pytest.skip("no derivative to check")
        assert torch.autograd.gradgradcheck(
            self._of(inputs, names),
            [inputs[n] for n in names],
            check_fwd_over_rev=self.case.with_tangent(names) == names,
            **GRADCHECK,
        )

    @pytest.mark.above_kernels
    def test_a_graph_of_the_gradient_changes_no_bit_of_it(self, variant: Inputs) -> None:
        case = self.case
        inputs = case.make(SITUATIONS["plain"], torch.float32, **variant)
        names = case.names(inputs)
        if not names:
            pytest.skip("no derivative to check")
        leaf = leaves(inputs, names)
        outputs = case(leaf)
        grads = torch.autograd.grad(
            outputs, [leaf[n] for n in names], cotangents(outputs), create_graph=True
        )
        assert_same(tuple(g.detach() for g in grads), run(case, inputs, names)[1])

    @pytest.mark.above_kernels
    @pytest.mark.usefixtures("one_thread")
    @pytest.mark.parametrize("grad_mode", [False, True])
    def test_forward_mode_is_reverse_mode(self, variant: Inputs, grad_mode: bool) -> None:
        """<g, J t> = <J^T g, t>, whether or not anybody wants a gradient as well."""
        inputs = self.case.make(SITUATIONS["plain"], torch.float64, **variant)
        for names in self._subsets(variant, every=True):
            if self.case.with_tangent(names) != names:
                continue
            function = self._of(inputs, names)
            values = [inputs[n] for n in names]
            tangents = [torch.randn_like(v) for v in values]
            leaf = [v.clone().requires_grad_() for v in values]
            outputs = function(*leaf)
            given = cotangents(outputs)
            grads = torch.autograd.grad(outputs, leaf, given)
            for wanted in (False, True):
                with torch.set_grad_enabled(grad_mode), forward_ad.dual_level():
                    duals = [
                        forward_ad.make_dual(v.clone().requires_grad_(wanted), t)
                        for v, t in zip(values, tangents, strict=True)
                    ]
                    results = [forward_ad.unpack_dual(y) for y in function(*duals)]
                    moved = [y.tangent.detach() for y in results]
                n = SITUATIONS["plain"].longest
                for y, (value, _) in zip(outputs, results, strict=True):
                    atol = tolerance(y, n=n, wide=torch.float64, stored=torch.float64)
                    assert_close(value.detach(), y.detach(), atol)
                left = torch.stack([(g * m).sum() for g, m in zip(given, moved, strict=True)])
                right = torch.stack([(g * t).sum() for g, t in zip(grads, tangents, strict=True)])
                torch.testing.assert_close(left.sum(), right.sum(), rtol=1e-10, atol=1e-10)

    @pytest.mark.above_kernels
    @pytest.mark.usefixtures("one_thread")
    def test_transforms(self, variant: Inputs) -> None:
        """torch.func's, against plain autograd, which has no levels."""
        inputs = self.case.make(SITUATIONS["plain"], torch.float64, **variant)
        names = self.case.with_tangent(self.case.names(inputs))
        if not names:
            pytest.skip("no derivative to check")
        function = self._of(inputs, names)
        values = tuple(inputs[n] for n in names)
        places = tuple(range(len(names)))
        jacobian = torch.autograd.functional.jacobian(function, values)
        close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
        close(torch.func.jacrev(function, places)(*values), jacobian)
        close(torch.func.jacfwd(function, places)(*values), jacobian)
        tangents = tuple(torch.randn_like(v) for v in values)
        pushed = tuple(
            sum(torch.tensordot(j, t, t.dim()) for j, t in zip(row, tangents, strict=True))
            for row in jacobian
        )
        outputs, moved = torch.func.jvp(function, values, tangents)
        close(moved, pushed)
        close(outputs, function(*values))
        close(torch.func.linearize(function, *values)[1](*tangents), pushed)
        given = cotangents(outputs)
        pulled = tuple(
            sum(torch.tensordot(g, j[i], g.dim()) for g, j in zip(given, jacobian, strict=True))
            for i in places
        )
        close(torch.func.vjp(function, *values)[1](given), pulled)

        def scalar(*values: Tensor) -> Tensor:
            products = zip(function(*values), given, strict=True)
            return torch.stack([(y * g).sum() for y, g in products]).sum().square()

        gradients = torch.autograd.functional.vjp(scalar, values)[1]
        close(torch.func.grad(scalar, places)(*values), gradients)
        several = [torch.stack([v, 2 * v, v.flip(0)]) for v in values]
        each = [torch.autograd.functional.vjp(scalar, v)[1] for v in zip(*several, strict=True)]
        stacked = tuple(torch.stack(g) for g in zip(*each, strict=True))
        close(torch.func.vmap(torch.func.grad(scalar, places))(*several), stacked)
        hessian = torch.autograd.functional.hessian(scalar, values)
        for i in places:
            close(torch.func.hessian(scalar, i)(*values), hessian[i][i])

    def _of(self, inputs: Inputs, names: tuple[str, ...]) -> Callable[..., Outputs]:
        """The op as a function of the named inputs."""
        return lambda *values: self.case(inputs | dict(zip(names, values, strict=True)))

    def test_any_strides_of_the_gradient(self, variant: Inputs) -> None:
        """A sum's gradient arrives with strides of 0."""
        inputs = self.case.make(SITUATIONS["dropped"], torch.float32, **variant)
        names = self.case.names(inputs)
        if not names:
            pytest.skip("no derivative to check")
        leaf = leaves(inputs, names)
        outputs = self.case(leaf)
        values = [leaf[n] for n in names]
        ones = [torch.ones_like(y) for y in outputs]
        expected = torch.autograd.grad(outputs, values, ones, retain_graph=True)
        for style in ("expanded", "transposed", "sliced"):
            views = [strided(g, style) for g in ones]
            actual = torch.autograd.grad(outputs, values, views, retain_graph=True)
            for a, e in zip(actual, expected, strict=True):
                n = SITUATIONS["dropped"].longest
                assert_close(a, e, tolerance(e, n=n, wide=a.dtype, stored=a.dtype))

    def test_strides_of_differentiable_inputs(self, variant: Inputs) -> None:
        inputs = self.case.make(SITUATIONS["dropped"], torch.float32, **variant)
        names = self.case.names(inputs)
        if not names:
            pytest.skip("no derivative to check")
        expected = run(self.case, inputs, names)[1]
        for style in ("transposed", "sliced"):
            views = {n: strided(inputs[n], style).requires_grad_() for n in names}
            outputs = self.case(inputs | views)
            actual = torch.autograd.grad(outputs, list(views.values()), cotangents(outputs))
            for a, e in zip(actual, expected, strict=True):
                n = SITUATIONS["dropped"].longest
                assert_close(a, e, tolerance(e, n=n, wide=a.dtype, stored=a.dtype))

    @pytest.mark.above_kernels
    def test_opcheck_with_gradients(self, variant: Inputs) -> None:
        for name in ("dropped", "no_tokens"):
            if name in self.case.situations:
                inputs = self.case.make(SITUATIONS[name], torch.float32, **variant)
                inputs = leaves(inputs, self.case.names(inputs))
                args = by_position(self.case.name, inputs)
                torch.library.opcheck(overload(self.case.name), *args)

    @pytest.mark.above_kernels
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing_gives_equal_gradients(
        self, variant: Inputs, use_reentrant: bool
    ) -> None:
        inputs = self.case.make(SITUATIONS["dropped"], torch.float32, **variant)
        names = self.case.names(inputs)
        if not names:
            pytest.skip("no derivative to check")

        def function(inputs: Inputs) -> Outputs:
            return checkpoint(
                lambda *values: self.case(inputs | dict(zip(names, values, strict=True))),
                *[inputs[n] for n in names],
                use_reentrant=use_reentrant,
            )

        actual, expected = run(function, inputs, names), run(self.case, inputs, names)
        assert_same(actual[0] + actual[1], expected[0] + expected[1])

    @pytest.mark.above_kernels
    def test_a_policy_of_checkpointing_is_asked_about_the_op(self) -> None:
        inputs = self.plain(torch.float32)
        inputs = leaves(inputs, self.case.names(inputs))
        seen: list[str] = []
        (y,) = selectively(self.case, inputs, seen=seen)
        y.sum().backward()
        assert seen == list(self.case.asked_as or (self.case.name,))
        seen.clear()
        selectively(self.case, map_tensors(inputs, Tensor.detach), seen=seen)
        assert seen == [self.case.name]

    @pytest.mark.above_kernels
    def test_autocast_gradients_keep_their_types(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = self.plain(dtype)
            names = self.case.names(inputs)
            leaf = leaves(inputs, names)
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                outputs = self.case(leaf)
            grads = torch.autograd.grad(
                outputs, [leaf[n] for n in names], [torch.ones_like(y) for y in outputs]
            )
            assert [g.dtype for g in grads] == [leaf[n].dtype for n in names]

    @pytest.mark.above_kernels
    @pytest.mark.slow
    def test_inductor(self) -> None:
        function = self.compiled("inductor", self.plain())
        for tokens in COMPILED_TOKENS[:2]:
            situation = Situation("compiled", T=tokens)
            inputs = self.case.make(situation, torch.float32, **self.case.variants[0])
            names = self.case.names(inputs)
            actual, expected = run(function, inputs, names), run(self.case, inputs, names)
            assert_same(actual[0] + actual[1], expected[0] + expected[1])
