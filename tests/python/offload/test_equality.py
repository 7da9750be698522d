"""Offloaded experts give the bits of the same experts in memory, in both directions."""

from __future__ import annotations

import pytest
import torch

from float_types import FLOATS
from streamed import assert_same, drawn, gradients, pair
from torchmoe import ops


@pytest.mark.parametrize("num_slots", [1, 2, 5, 8])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_number_of_residents(dtype: torch.dtype, num_slots: int) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    given = pair(num_slots=num_slots, dtype=dtype)
    for tokens, top_k in ((1, 1), (2, 3), (40, 2), (7, 8), (300, 4)):
        assert_same(given, drawn(given.resident, tokens, top_k, weights=wide))
    assert given.offloaded.misses > 0
    assert given.offloaded.peak_resident_bytes <= given.offloaded.budget


@pytest.mark.parametrize("tokens", [512, 2048])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_of_several_blocks(dtype: torch.dtype, top_k: int, tokens: int) -> None:
    """On two threads, whose tasks then differ between the two ways."""
    torch.set_num_threads(2)
    given = pair(256, 512, 16, num_slots=5, dtype=dtype, bias=False)
    assert_same(given, drawn(given.resident, tokens, top_k))
    assert_same(given, drawn(given.resident, tokens, top_k))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_every_activation(activation: str, bias: bool) -> None:
    given = pair(num_slots=2, activation=activation, bias=bias)
    assert_same(given, drawn(given.resident, 30, 2))


@pytest.mark.parametrize("num_slots", [2, 8])
def test_only_some_gradients(num_slots: int) -> None:
    given = pair(num_slots=num_slots)
    call = drawn(given.resident, 30, 2)
    assert_same(given, call, w=False)
    assert_same(given, call, x=False)


@pytest.mark.parametrize("num_slots", [2, 8])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_types_of_weights(own: torch.dtype, dtype: torch.dtype, num_slots: int) -> None:
    if dtype == torch.bfloat16 != own:
        pytest.skip("refused")
    given = pair(num_slots=num_slots, dtype=own)
    assert_same(given, drawn(given.resident, 30, 2, weights=dtype))


@pytest.mark.parametrize("num_slots", [2, 8])
@pytest.mark.parametrize(
    ("tokens", "own"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float16, torch.bfloat16),
    ],
)
def test_tokens_of_another_type(tokens: torch.dtype, own: torch.dtype, num_slots: int) -> None:
    given = pair(num_slots=num_slots, dtype=own)
    call = drawn(given.resident, 30, 2, weights=torch.float32)
    assert_same(given, call._replace(x=call.x.to(tokens), grad=call.grad.to(tokens)))


@pytest.mark.parametrize("num_slots", [2, 8])
def test_nothing_is_routed(num_slots: int) -> None:
    given = pair(num_slots=num_slots)
    for ids in (torch.full((5, 2), -1), torch.full((5, 2), 8), torch.empty(0, 2, dtype=torch.int64),
                torch.empty(5, 0, dtype=torch.int64)):  # fmt: skip
        assert_same(given, drawn(given.resident, len(ids), 2, ids=ids))
    assert given.offloaded.misses == given.offloaded.bytes_read == 0


@pytest.mark.parametrize("num_slots", [2, 8])
def test_what_is_not_routed_is_not_read(num_slots: int) -> None:
    given = pair(num_slots=num_slots)
    call = drawn(given.resident, 30, 2)
    idle = (call.indices < 0) | (call.indices >= 8)
    call.weights[idle] = torch.nan
    call.x[idle.all(1)] = torch.nan
    call.grad[idle.all(1)] = torch.nan
    assert_same(given, call)
    assert not gradients(given.offloaded, call)[0].isnan().any()


@pytest.mark.parametrize("num_slots", [2, 8])
def test_strides(num_slots: int) -> None:
    given = pair(num_slots=num_slots)
    call = drawn(given.resident, 30, 2)
    strided = call._replace(
        x=call.x.t().contiguous().t(),
        indices=call.indices.t().contiguous().t(),
        weights=call.weights.repeat(1, 2)[:, ::2],
        grad=call.grad[:1].expand(30, 8),
    )
    assert not strided.x.is_contiguous()
    assert_same(given, strided._replace(weights=strided.weights.contiguous()))
    with torch.no_grad():
        y = given.offloaded(strided.x, strided.indices, strided.weights)
        assert torch.equal(y, given.resident(strided.x, strided.indices, strided.weights))


def test_residents_of_the_forward_pass_may_be_gone() -> None:
    """Two passes forward, and backward in either order."""
    given = pair(num_slots=3)
    calls = [drawn(given.resident, 20, 2) for _ in range(2)]
    for order in ((0, 1), (1, 0)):
        found = []
        for experts in given:
            leaves = [call.x.clone().requires_grad_() for call in calls]
            outputs = [experts(x, *call[1:3]) for x, call in zip(leaves, calls, strict=True)]
            for i in order:
                outputs[i].backward(calls[i].grad)
            found.append([leaf.grad for leaf in leaves])
        for a, e in zip(*found, strict=True):
            assert torch.equal(a, e)


def test_a_graph_may_be_used_twice() -> None:
    given = pair(num_slots=2)
    call = drawn(given.resident, 20, 2)
    x = call.x.clone().requires_grad_()
    y = given.offloaded(x, *call[1:3])
    first, second = (torch.autograd.grad(y, x, call.grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
