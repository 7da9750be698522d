"""The ops' cases on another device: inputs made on the CPU and moved, references left there.

DEVICE is set while a test runs, by the fixture in cuda/conftest.py: tests are collected on machines
without that device, too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from op_case import Function, Inputs, OpCase, Outputs, as_tuple, bind, leaves, map_tensors
from op_harness import OpTests
from torchmoe.nn import Balance, Capacity, Gate, MoE

DEVICE = "cpu"


def moved(inputs: Inputs) -> Inputs:
    """Onto the device under test."""
    return map_tensors(inputs, lambda tensor: tensor.to(DEVICE))


def on_cpu(inputs: Inputs) -> Inputs:
    return map_tensors(inputs, Tensor.cpu)


def on_device(case: OpCase) -> OpCase:
    """The case with its inputs, and what its reference returns, on the device under test."""
    private, poison = case.private, case.poison

    def make(*args: Any, **variant: Any) -> Inputs:
        return moved(case.make(*args, **variant))

    def reference(**inputs: Any) -> Outputs:
        return tuple(y.to(DEVICE) for y in as_tuple(case.reference(**on_cpu(inputs))))

    return replace(
        case,
        make=make,
        reference=reference,
        private=private and (lambda i: [(op, moved(p)) for op, p in private(on_cpu(i))]),
        poison=poison and (lambda i: moved(poison(on_cpu(i)))),
    )


def op_tests(*, on_cpu_alone: bool = False) -> Iterator[type[OpTests]]:
    """The class of every op, from its file in ops/; if asked, those of the CPU alone too."""
    for path in sorted((Path(__file__).parent / "ops").glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(f"on_device_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for value in vars(module).values():
            if not isinstance(value, type) or "case" not in vars(value):
                continue
            if issubclass(value, OpTests) and (on_cpu_alone or not value.case.on_cpu_alone):
                yield value


def prepared(case: OpCase, inputs: Inputs) -> tuple[Function, tuple[str, ...], Outputs]:
    """The op, its differentiable inputs and cotangents on the device, for `forward_backward`."""
    function = bind(case.name, inputs)
    names = case.names(inputs)
    outputs = function(map_tensors(inputs, Tensor.detach))
    generator = torch.Generator().manual_seed(1)
    given = tuple(torch.randn(y.shape, generator=generator).to(y) for y in outputs if names)
    return function, names, given


def forward_backward(
    function: Function, inputs: Inputs, names: tuple[str, ...], given: Outputs
) -> Outputs:
    """Outputs and gradients; nothing here reads from or writes to the host."""
    inputs = leaves(inputs, names)
    outputs = function(inputs)
    grads: Outputs = ()
    if names:
        grads = torch.autograd.grad(outputs, [inputs[name] for name in names], given)
    return tuple(y.detach() for y in outputs) + grads


@contextmanager
def busy_device() -> Iterator[None]:
    """Products on another stream that fill every multiprocessor, on a GPU."""
    if DEVICE == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    a = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(100):
            torch.mm(a, a)
    yield
    stream.synchronize()


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Whatever waits for the device, or copies from it, is an error."""
    if DEVICE == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_stream(stream: torch.cuda.Stream | None) -> Any:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


# The layer's ways through its ops.
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "drop": {"capacity": Capacity(1.0), "balance": Balance(z_loss_weight=1e-3), "bias": True},
    "next_best": {"capacity": Capacity(1.0, overflow="next_best", order="token")},
    "backup": {
        "capacity": Capacity(1.0, overflow="backup", backup=(1, 2, 3, 4, 5, 6, 7, 0)),
        "activation": "gelu",
    },
    "weight_priority": {"capacity": Capacity(1.0, priority="weight")},
    "sigmoid": {
        "gate": Gate(score_function="sigmoid"),
        "balance": Balance(selection_bias_rate=1e-3),
    },
    "straight_through": {"gate": Gate(estimator="straight_through")},
    "dense": {"gate": Gate(estimator="straight_through_dense")},
}


class LayerStep:
    """A layer's forward and backward as a function of x, all tensors on the device."""

    def __init__(self, name: str, dtype: torch.dtype, *, tokens: int = 96) -> None:
        self.layer = MoE(48, 40, 8, 2, dtype=dtype, **LAYERS[name])
        # Parameters of order one, so that no gradient is lost in the tolerance.
        for parameter in self.layer.parameters():
            parameter.data.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
        self.layer.to(DEVICE)
        self.x = torch.randn(tokens, 48).to(dtype).to(DEVICE).requires_grad_()
        self.grad = torch.randn(tokens, 48).to(dtype).to(DEVICE)
        self.parameters = list(self.layer.parameters())

    def __call__(self) -> list[Tensor]:
        """Hidden states, loss, the experts' ids, and every gradient."""
        output = self.layer(self.x)
        y, loss = output.hidden_states, output.aux_loss
        grads = torch.autograd.grad(
            [y, loss], [self.x, *self.parameters], [self.grad, torch.ones_like(loss)]
        )
        return [y.detach(), loss.detach(), output.routing.indices, *grads]
