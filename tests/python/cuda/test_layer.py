"""The layer on the GPU: the CPU's numbers, without a wait, captured, compiled, under autocast."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch.utils._triton import has_triton

import on_device
from on_device import LAYERS, LayerStep, busy_device, no_host_sync
from op_case import C, assert_same

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("default")]

TYPES = (torch.float32, torch.bfloat16)


def on_the_cpu(step: LayerStep) -> LayerStep:
    other = deepcopy(step)
    other.layer.cpu()
    other.x = step.x.detach().cpu().requires_grad_()
    other.grad = step.grad.cpu()
    other.parameters = list(other.layer.parameters())
    return other


def assert_near(actual: list[torch.Tensor], expected: list[torch.Tensor], eps: float) -> None:
    """A chain of four sums (router, w_in, w_out and one of their gradients), 192 slots at most."""
    for a, e in zip(actual, expected, strict=True):
        if not e.is_floating_point():
            assert torch.equal(a.cpu(), e.cpu())
            continue
        scale = max(1.0, e.abs().max().item())
        torch.testing.assert_close(a.cpu(), e.cpu(), rtol=0, atol=C * eps * scale)


@pytest.mark.parametrize("name", LAYERS)
def test_the_cpus_numbers(name: str) -> None:
    step = LayerStep(name, torch.float32)
    assert_near(step(), on_the_cpu(step)(), 4 * 192 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_two_steps_are_equal(name: str, dtype: torch.dtype) -> None:
    step = LayerStep(name, dtype)
    first = tuple(step())
    assert_same(tuple(step()), first)
    with busy_device():
        loaded = tuple(step())
    assert_same(loaded, first)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_never_waits_for_the_device(name: str, masked: bool) -> None:
    step = LayerStep(name, torch.bfloat16)
    mask = (torch.rand(len(step.x)) < 0.7).to(step.x.device) if masked else None
    layer, parameters = step.layer, [step.x, *step.parameters]

    def run() -> None:
        output = layer(step.x, token_mask=mask)
        losses = [output.hidden_states, output.aux_loss]
        grads = [step.grad, torch.ones_like(output.aux_loss)]
        torch.autograd.grad(losses, parameters, grads)
        layer.update(output.routing)

    run()
    with no_host_sync():
        run()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_graph_replays_a_step(name: str, dtype: torch.dtype, real_device: torch.device) -> None:
    """A hundred times, with other tokens each time, bit for bit what the eager step gives."""
    step = LayerStep(name, dtype)
    stream = torch.cuda.Stream(real_device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    tokens = torch.randn(100, *step.x.shape, device=real_device).to(dtype)
    for i, x in enumerate(tokens):
        with torch.no_grad():
            # Ever more alike, so that ever more of them want the same experts.
            step.x.copy_(x * (1 - i / 100) + tokens[0, 0] * i / 100)
            step.grad.copy_(tokens[i - 1])
        graph.replay()
        replayed = tuple(t.clone() for t in captured)
        assert_same(replayed, tuple(step()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_eagers_numbers(backend: str) -> None:
    if backend == "inductor" and on_device.DEVICE != "cpu" and not has_triton():
        pytest.skip("needs triton")
    step = LayerStep("drop", torch.float32)
    expected = step()
    step.layer.compile(fullgraph=True, backend=backend)
    # Inductor may fuse and reorder what lies between the ops, one rounding here or there.
    eps = 192 * torch.finfo(torch.float32).eps if backend == "inductor" else 0.0
    assert_near(step(), expected, eps)


def test_autocast_narrows_the_experts_and_nothing_else() -> None:
    step = LayerStep("next_best", torch.float32)
    narrow = on_the_cpu(step)
    kind = step.x.device.type
    with torch.autocast(kind, dtype=torch.bfloat16):
        output = step.layer(step.x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = narrow.layer(narrow.x)
    y, loss = output.hidden_states, output.aux_loss
    assert y.dtype == torch.bfloat16
    assert output.routing.logits.dtype == torch.float32
    grads = torch.autograd.grad(
        [y, loss], [step.x, *step.parameters], [step.grad.to(y), torch.ones_like(loss)]
    )
    assert [g.dtype for g in grads] == [torch.float32] * len(grads)
    wanted = torch.autograd.grad(
        [expected.hidden_states, expected.aux_loss],
        [narrow.x, *narrow.parameters],
        [narrow.grad.bfloat16(), torch.ones_like(expected.aux_loss)],
    )
    exact = 4 * 192 * torch.finfo(torch.float32).eps
    assert_near(
        [output.routing.indices, output.routing.logits, output.routing.weights, loss.detach()],
        [
            expected.routing.indices,
            expected.routing.logits,
            expected.routing.weights,
            expected.aux_loss.detach(),
        ],
        exact,
    )
    # Activations and the experts' outputs are rounded on the GPU, pre-activations, their gradients
    # and the results on both.
    rounded = exact + 6 * torch.finfo(torch.bfloat16).eps
    assert_near([y, *grads], [expected.hidden_states, *wanted], rounded)
