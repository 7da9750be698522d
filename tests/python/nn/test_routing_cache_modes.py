"""RoutingCache under checkpoints, compilers, threads, narrow types and transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchmoe import RoutingCache
from torchmoe.nn import Balance, MoE, MoEOutput, Router, SequenceRouter, WithAttachedLoss

H, I, E, K = 16, 24, 8, 2  # noqa: E741  the glossary's letter


def made(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[MoE, Tensor]:
    """A layer that has seen half of the tokens, and tokens like them."""
    moe = MoE(
        H, I, E, K, cache=RoutingCache(64, 0.9), balance=Balance(0.01), dtype=dtype, **settings
    )
    x = torch.randn(4, 10, H, dtype=dtype)
    moe.update(moe(x[:2]).routing)
    return moe, (x + 0.1 * torch.randn(x.shape)).to(dtype)


def gradients(moe: MoE, x: Tensor, call: Callable[[Tensor], MoEOutput]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    output = call(x)
    moe.zero_grad()
    (output[0].float().square().sum() + output[1]).backward()
    return [tensor.grad for tensor in (x, *moe.parameters()) if tensor.grad is not None]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    moe, x = made()
    expected = gradients(moe, x, moe)

    def checkpointed(x: Tensor) -> MoEOutput:
        output: MoEOutput = checkpoint(moe, x, use_reentrant=reentrant)
        return output

    assert_same(gradients(moe, x, checkpointed), expected)
    moe.update(MoEOutput(*checkpointed(x.requires_grad_())).routing)
    assert moe.cache is not None
    assert moe.cache.lookups == 60


# Dynamo looks at the gradient of what it goes on with after the break.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiler_breaks_its_graph_and_gives_the_same() -> None:
    moe, x = made()
    expected = moe(x)
    compiled = torch.compile(moe, backend="aot_eager")
    routing = compiled(x).routing
    assert torch.equal(routing.details["cache_hit"], expected.routing.details["cache_hit"])
    assert torch.equal(routing.selected, expected.routing.selected)
    assert_same(gradients(moe, x, compiled), gradients(moe, x, moe))
    moe.update(routing)
    with torch.no_grad():
        moe.router.weight.neg_()
    assert torch.equal(compiled(x).routing.selected, moe(x).routing.selected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_types(dtype: torch.dtype, kind: str) -> None:
    router = Router(H, E, dtype=dtype)
    moe, _ = made(dtype, router=router if kind == "token" else SequenceRouter(router))
    x = torch.randn(4, 10, H, dtype=dtype)
    first = moe(x).routing
    moe.update(first)
    again = moe(x).routing
    assert (again.details["cache_hit"] >= 0).all()
    assert torch.equal(again.selected, first.selected)
    assert torch.equal(again.weights, first.weights)


def test_autocast() -> None:
    moe, x = made()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = moe(x)
        moe.update(first.routing)
        again = moe(x)
    assert (again.routing.details["cache_hit"] >= 0).all()
    assert again.hidden_states.dtype == torch.bfloat16


def test_the_number_of_threads_changes_nothing() -> None:
    moe = MoE(64, I, E, K, cache=RoutingCache(1000, 0.9))
    x = torch.randn(3000, 64)
    moe.update(moe(x[:1500]).routing)
    assert moe.cache is not None
    state, near = moe.cache.state_dict(), x + 0.1 * torch.randn(x.shape)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        moe.cache.load_state_dict(state)
        routing = moe(near).routing
        moe.update(routing)
        kept = [v for v in moe.cache.state_dict().values() if isinstance(v, Tensor)]
        results.append([routing.selected, routing.details["cache_hit"], *kept])
    for result in results[1:]:
        assert_same(result, results[0])


def test_transforms() -> None:
    moe, x = made()
    parameters = dict(moe.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        output = torch.func.functional_call(moe, parameters, (x,))
        total: Tensor = output.hidden_states.square().sum() + output.aux_loss
        return total

    by_transform = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    expected = gradients(moe, x, moe)
    assert_same([by_transform[1], *by_transform[0].values()], expected)
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, forward = torch.func.jvp(lambda p: loss(p, x), (parameters,), (tangents,))
    parts = [(tangents[n] * g).sum() for n, g in by_transform[0].items()]
    backward = torch.stack(parts).sum().detach()
    torch.testing.assert_close(forward.detach().item(), backward.item(), rtol=1e-4, atol=1e-4)


def test_inference_mode_then_training() -> None:
    moe, x = made()
    assert moe.cache is not None
    moe.eval()
    with torch.inference_mode():
        moe.cache.update(moe(x).routing)
    moe.train()
    output = moe(x)
    (output.hidden_states.sum() + output.aux_loss).backward()
    moe.update(output.routing)
    assert (output.routing.details["cache_hit"] >= 0).all()


def test_inside_a_wrapper() -> None:
    moe, x = made()
    wrapped = WithAttachedLoss(moe)
    assert torch.equal(wrapped(x), moe(x).hidden_states)


def test_on_meta() -> None:
    moe = MoE(H, I, E, K, cache=RoutingCache(8), device="meta")
    routing = moe(torch.randn(5, H, device="meta")).routing
    assert routing.details["cache_hit"].is_meta
    assert routing.details["cache_hit"].shape == (5,)


def test_a_sharded_router_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, x = made()
    # As a DTensor does; making one needs a group of processes.
    monkeypatch.setattr(moe.router.weight, "full_tensor", lambda: None, raising=False)
    with pytest.raises(RuntimeError, match=r"^RoutingCache: router must not be sharded, got a DT"):
        moe(x)
