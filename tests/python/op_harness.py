"""The checklist every op passes.

A test file fills in an OpCase (op_case.py) like a form:

    class TestPermute(DifferentiableOpTests):
        case = OpCase(name="permute", schema="...", make=make, reference=reference.permute, ...)

and adds what is particular to the op.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from op_case import (
    ErrorCase,
    Function,
    Inputs,
    OpCase,
    as_tuple,
    assert_close,
    assert_same,
    bind,
    by_position,
    has_nan,
    id_names,
    map_tensors,
    overload,
    present,
    run,
    strided,
    tolerance,
    wide_dtype,
)
from situations import COMPILED_TOKENS, SITUATIONS, TABLES, THREADS, Situation


def _index(entry: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(i) for i in entry)


class OpTests:
    """What every op keeps. Subclasses set `case`."""

    case: ClassVar[OpCase]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        case = self.case
        values: dict[str, tuple[Any, ...]] = {
            "situation": tuple(SITUATIONS[name] for name in case.situations),
            "dtype": case.dtypes,
            "variant": case.variants,
            "style": ("transposed", "sliced", "expanded"),
            "error": case.errors,
        }
        for argument, given in values.items():
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, given, ids=id_names(given))

    def plain(self, dtype: torch.dtype = torch.float32, **variant: Any) -> Inputs:
        """Ordinary inputs of the first variant."""
        name = "dropped" if "dropped" in self.case.situations else "plain"
        return self.case.make(SITUATIONS[name], dtype, **(self.case.variants[0] | variant))

    @property
    def device(self) -> torch.device:
        """Where `case` makes its inputs."""
        return next(v.device for v in self.plain().values() if isinstance(v, Tensor))

    def compiled(self, backend: Any, inputs: Inputs) -> Function:
        function = bind(self.case.name, inputs)
        return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)

    @pytest.mark.above_kernels
    def test_schema(self) -> None:
        assert str(overload(self.case.name)._schema) == "torchmoe::" + self.case.schema
        assert getattr(torch.ops.torchmoe, self.case.name).overloads() == ["default"]

    def test_forward_is_the_reference(
        self, situation: Situation, dtype: torch.dtype, variant: Inputs
    ) -> None:
        case = self.case
        inputs = case.make(situation, dtype, **variant)
        wide = wide_dtype(dtype)
        for actual, expected in zip(case(inputs), case.expect(inputs), strict=True):
            assert actual.shape == expected.shape
            assert actual.is_contiguous()
            if not expected.is_floating_point():
                assert actual.dtype == expected.dtype
                assert torch.equal(actual, expected)
                continue
            assert actual.dtype == (wide if case.result_is_wide else dtype)
            atol = tolerance(
                expected,
                n=situation.longest,
                wide=wide,
                stored=actual.dtype,
                roundings=case.roundings,
            )
            assert_close(actual, expected, atol)

    @pytest.mark.above_kernels
    def test_wrapper_is_the_op(self, variant: Inputs) -> None:
        inputs = self.case.make(SITUATIONS["plain"], torch.float32, **variant)
        assert_same(as_tuple(self.case.wrapper(inputs)), self.case(inputs))

    def test_any_strides(self, style: str, variant: Inputs) -> None:
        case = self.case
        plain = case.make(SITUATIONS["plain"], torch.float32, **variant)
        for name, value in plain.items():
            if not isinstance(value, Tensor) or (style == "expanded" and name in TABLES):
                continue
            view = strided(value, style)
            actual = case(plain | {name: view})
            expected = case(plain | {name: view.contiguous()})
            for a, e in zip(actual, expected, strict=True):
                n = SITUATIONS["plain"].longest
                atol = tolerance(e, n=n, wide=torch.float32, stored=torch.float32)
                assert_close(a, e, atol if e.is_floating_point() else 0.0)

    def test_inputs_are_left_alone(self, variant: Inputs) -> None:
        inputs = self.case.make(SITUATIONS["plain"], torch.float32, **variant)
        before = map_tensors(inputs, Tensor.clone)
        outputs = self.case(inputs)
        storages = {
            v.untyped_storage().data_ptr() for v in inputs.values() if isinstance(v, Tensor)
        }
        assert not storages & {y.untyped_storage().data_ptr() for y in outputs}
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                assert torch.equal(value, before[name]), name

    @pytest.mark.above_kernels
    def test_meta_gives_shape_and_dtype(
        self, situation: Situation, dtype: torch.dtype, variant: Inputs
    ) -> None:
        inputs = self.case.make(situation, dtype, **variant)
        on_meta = self.case(map_tensors(inputs, lambda t: t.to("meta")))
        for actual, expected in zip(on_meta, self.case(inputs), strict=True):
            assert actual.is_meta
            assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
            assert actual.stride() == expected.stride()

    @pytest.mark.above_kernels
    def test_opcheck(self, situation: Situation) -> None:
        if situation.name in ("large", "aligned"):
            pytest.skip("too large for opcheck")
        inputs = self.case.make(situation, torch.float32, **self.case.variants[0])
        torch.library.opcheck(overload(self.case.name), *by_position(self.case.name, inputs))

    @pytest.mark.above_kernels
    def test_opcheck_of_the_private_ops(self, variant: Inputs) -> None:
        if self.case.private is None:
            pytest.skip("no private op")
        for name in ("dropped", "no_tokens"):
            inputs = self.case.make(SITUATIONS[name], torch.float32, **variant)
            for op, private in self.case.private(inputs):
                torch.library.opcheck(overload(op), *by_position(op, private))

    @pytest.mark.above_kernels
    def test_none_for_a_tensor(self) -> None:
        """C++ passes an undefined tensor for it, which has neither shape nor device."""
        inputs = self.plain()
        schema = overload(self.case.name)._schema
        required = [a.name for a in schema.arguments if str(a.type) == "Tensor"]
        for name in required if len(required) > 1 else ():
            with pytest.raises(TypeError, match=f"^{self.case.name}: {name} must be a tensor, got"):
                self.case(inputs | {name: None})

    @pytest.mark.above_kernels
    def test_inference_mode_gives_the_same(self, variant: Inputs) -> None:
        inputs = self.case.make(SITUATIONS["plain"], torch.float32, **variant)
        expected = self.case(inputs)
        with torch.inference_mode():
            actual = self.case(inputs)
        assert_same(actual, expected)

    @pytest.mark.above_kernels
    @pytest.mark.parametrize("where", ["eager", "inference_mode", "meta"])
    def test_errors(self, error: ErrorCase, where: str) -> None:
        case = self.case
        inputs = error.change(self.plain())
        if where == "meta":
            inputs = map_tensors(inputs, lambda t: t.to("meta"))
        with (
            torch.inference_mode(where == "inference_mode"),
            pytest.raises(error.exception, match=error.message(case.name)) as caught,
        ):
            case(inputs)
        assert type(caught.value) is error.exception
        assert not re.search(r"\.$", str(caught.value).splitlines()[0]), "no full stop"

    @pytest.mark.above_kernels
    def test_devices_must_agree(self) -> None:
        """Meta is another device, on every machine."""
        inputs = self.plain()
        first, *others = [name for name, v in inputs.items() if isinstance(v, Tensor)]
        for name in others:
            mixed = inputs | {name: inputs[name].to("meta")}
            message = (
                rf"^{self.case.name}: {name} must be on the device of {first} \({self.device}\), "
                "got meta"
            )
            with pytest.raises(RuntimeError, match=message):
                self.case(mixed)

    @pytest.mark.above_kernels
    def test_autocast(self) -> None:
        """Float64 is left alone; one input already in bfloat16 must not clash with the others."""
        case = self.case
        names = case.autocast.names if case.autocast is not None else ()
        mixed = self.plain(torch.float32)
        mixed |= {n: mixed[n].to(torch.bfloat16) for n in names[:1]}
        kinds = [self.plain(t) for t in (torch.float32, torch.bfloat16, torch.float64)]
        for inputs in (*kinds, mixed):
            cast = dict(inputs)
            for n in present(inputs, names):
                if case.autocast is not None and inputs[n].dtype != torch.float64:
                    cast[n] = inputs[n].to(case.autocast.dtype)
            expected = case(cast)
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                actual = case(inputs)
            assert [y.dtype for y in actual] == [y.dtype for y in expected]
            assert_same(actual, expected)

    def test_uninitialised_memory_stays_inside(self, variant: Inputs) -> None:
        for name in ("dropped", "all_dropped", "no_tokens"):
            if name not in self.case.situations:
                continue
            inputs = self.case.make(SITUATIONS[name], torch.float32, **variant)
            names = self.case.names(inputs)
            expected = run(self.case, inputs, names)
            assert torch.utils.deterministic.fill_uninitialized_memory
            torch.use_deterministic_algorithms(True)
            try:
                actual = run(self.case, inputs, names)
            finally:
                torch.use_deterministic_algorithms(False)
            for a, e in zip(actual, expected, strict=True):
                assert not has_nan(e)
                assert_same(a, e)

    @pytest.mark.above_kernels
    def test_number_of_threads_changes_nothing(self, variant: Inputs) -> None:
        for dtype in (torch.float32, torch.float64):
            inputs = self.case.make(THREADS, dtype, **variant)
            names = self.case.names(inputs)
            results = []
            for threads in (1, 2, 3, 4, 8, 1):
                torch.set_num_threads(threads)
                outputs, grads = run(self.case, inputs, names)
                results.append(outputs + grads)
            for result in results[1:]:
                assert_same(result, results[0])

    def test_poison_where_nothing_is_routed(self, variant: Inputs) -> None:
        case = self.case
        if case.poison is None:
            pytest.skip("nothing to poison")
        for name in ("dropped", "all_dropped", "out_of_range"):
            inputs = case.make(SITUATIONS[name], torch.float32, **variant)
            poisoned = case.poison(inputs)
            assert has_nan(tuple(v for v in poisoned.values() if isinstance(v, Tensor)))
            names = case.names(inputs)
            clean = run(case, inputs, names)
            dirty = run(case, poisoned, names)
            assert not has_nan(dirty[0] + dirty[1])
            assert_same(dirty[0] + dirty[1], clean[0] + clean[1])

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("entry", [(1,), (1, 0)], ids=["row", "element"])
    def test_nonfinite_values_stay_in_their_token(
        self, variant: Inputs, value: float, entry: tuple[int, ...]
    ) -> None:
        case = self.case
        name = case.token_input
        if name is None:
            pytest.skip("no input per token")
        inputs = case.make(SITUATIONS["plain"], torch.float32, **variant)
        spoiled = inputs | {name: inputs[name].index_put(_index(entry), torch.tensor(value))}
        names = (name,) if name in case.names(inputs) else ()
        clean, clean_grads = run(case, inputs, names)
        actual, actual_grads = run(case, spoiled, names)
        (expected,) = case.expect(spoiled)
        n = SITUATIONS["plain"].longest
        atol = tolerance(expected, n=n, wide=torch.float32, stored=torch.float32)
        assert_close(actual[0], expected, atol)
        others = torch.arange(len(expected)) != 1
        pairs = zip(actual + actual_grads, clean + clean_grads, strict=True)
        for a, c in pairs:
            assert torch.equal(a[others], c[others])

    @pytest.mark.above_kernels
    # A float setting is a constant, as it is in a layer; else dynamo tries it as a symbol first.
    @torch._dynamo.config.patch(specialize_float=True)
    def test_compiles_once_for_every_token_count(self, variant: Inputs) -> None:
        counter = CompileCounterWithBackend("aot_eager")
        function = self.compiled(counter, self.plain(**variant))
        for tokens in COMPILED_TOKENS:
            inputs = self.case.make(Situation("compiled", T=tokens), torch.float32, **variant)
            names = self.case.names(inputs)
            actual, expected = run(function, inputs, names), run(self.case, inputs, names)
            assert_same(actual[0] + actual[1], expected[0] + expected[1])
        assert counter.frame_count == 1
