"""A layer made of the ops under torch.compile: one graph, one compile, the eager values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from pipeline import Layer
from situations import COMPILED_TOKENS, normal
from torchmoe import ops

SIZES = (5, 3, 4, 2, 4)  # H, I, E, K, capacity


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_a_layer_compiles_once_for_every_token_count() -> None:
    layer = Layer.make(*SIZES)
    counter = CompileCounterWithBackend("aot_eager")
    forward = torch.compile(layer.forward, fullgraph=True, dynamic=True, backend=counter)
    for tokens in COMPILED_TOKENS:
        x = normal(tokens, 5, dtype=torch.float32).requires_grad_()
        y = forward(x)
        grads = torch.autograd.grad(y.square().sum(), [x, *layer.parameters])
        assert_same([y.detach(), *grads], layer.step(x))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_a_layer_under_inductor() -> None:
    layer = Layer.make(*SIZES)
    forward = torch.compile(layer.forward, fullgraph=True, dynamic=True)
    x = normal(11, 5, dtype=torch.float32).requires_grad_()
    y = forward(x)
    grads = torch.autograd.grad(y.square().sum(), [x, *layer.parameters])
    for actual, expected in zip([y.detach(), *grads], layer.step(x), strict=True):
        # Inductor may fuse and reorder what lies between the ops, one rounding here or there.
        atol = 4 * 22 * torch.finfo(torch.float32).eps * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# Torch's own tracing looks at .grad of what autograd saved.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_compiled_autograd() -> None:
    layer = Layer.make(*SIZES)
    x = normal(11, 5, dtype=torch.float32).requires_grad_()
    expected = layer.step(x)
    with compiled_autograd._enable(torch.compile(backend="aot_eager", dynamic=True)):
        layer.forward(x).square().sum().backward()
    assert_same([x.grad, *(p.grad for p in layer.parameters)], expected[1:])


def test_a_symbolic_number_of_experts() -> None:
    """The number of experts may come from a tensor's symbolic shape."""

    def function(indices: Tensor, weight: Tensor) -> Tensor:
        return ops.dispatch_plan(indices, weight.size(0)).expert_offsets

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for experts in (5, 8, 13):
        indices = torch.randint(-1, experts, (7, 2))
        weight = torch.empty(experts, 3)
        assert torch.equal(compiled(indices, weight), function(indices, weight))
    assert counter.frame_count == 1


def test_errors_under_compile_name_the_op() -> None:
    compiled = torch.compile(ops.router_logits, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"router_logits: weight must .*, got shape \[4, 3\]"):
        compiled(torch.randn(6, 5), torch.randn(4, 3))
