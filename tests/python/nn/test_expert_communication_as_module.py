"""Communicating experts as a module, and what they refuse."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from communicating_experts import (
    F64,
    HEADS,
    INNER,
    SIZE,
    E,
    H,
    K,
    T,
    eps,
    ids,
    moe_of,
    run,
    scaled,
    stacked,
    talking,
)
from copies import by_pickle, load_state
from float_types import AUTOCAST, NARROW
from plain_moe import gradients
from torchmoe.nn import (
    Capacity,
    ExpertCommunication,
    Experts,
    MoE,
)

# ---- as modules do


@pytest.mark.parametrize("token_mask", [False, True])
def test_compile_once_for_all_token_counts(token_mask: bool) -> None:
    moe = moe_of(talking(stacked()), capacity=Capacity(0.9))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (11, 17, 40, 13):
        x = torch.randn(num_tokens, H, dtype=F64)
        mask = torch.rand(num_tokens) > 0.3 if token_mask else None
        seen = []
        for layer in (moe, compiled):
            moe.zero_grad()
            leaf = x.clone().requires_grad_()
            output = layer(leaf, token_mask=mask)
            (output.hidden_states.square().sum() + output.aux_loss).backward()
            seen.append({"y": output.hidden_states, "x": leaf.grad} | gradients(moe))
        assert_close(seen[0], seen[1])
    assert counter.frame_count == 1


def narrow_tolerance(layer: ExpertCommunication, dtype: torch.dtype, y: Tensor) -> float:
    """Ten values in a row are rounded to dtype, each as large as the longest sum that meets it.

    x, the four products of the experts and the projections with their operands, and the two sums.
    """
    return (
        10 * eps(dtype) * max(1.0, layer.out_proj.abs().sum(1).max().item(), y.abs().max().item())
    )


@pytest.mark.parametrize("dtype", AUTOCAST)
def test_autocast(dtype: torch.dtype) -> None:
    moe = moe_of(talking(stacked(torch.float32), torch.float32), router=None, dtype=None)
    x = torch.randn(T, H, requires_grad=True)
    expected = moe(x).hidden_states
    with torch.autocast("cpu", dtype=dtype):
        output = moe(x)
    assert output.hidden_states.dtype == dtype
    tolerance = narrow_tolerance(moe.experts, dtype, expected)
    assert_close(output.hidden_states.float(), expected, rtol=0, atol=tolerance)
    (output.hidden_states.float().square().sum() + output.aux_loss).backward()
    for gradient in gradients(moe).values():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_parameters(dtype: torch.dtype) -> None:
    narrow = talking(stacked(dtype), dtype)
    indices, x, weights = ids("dropped"), torch.randn(T, H).to(dtype), torch.rand(T, K)
    y = narrow(x, indices, weights)
    assert y.dtype == dtype
    expected = copy.deepcopy(narrow).float()(x.float(), indices, weights)
    tolerance = narrow_tolerance(narrow, dtype, expected)
    assert_close(y.float(), expected, rtol=0, atol=tolerance)
    y.float().square().sum().backward()
    for gradient in gradients(narrow).values():
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()


def test_small_outputs_have_a_direction_in_narrow_types_too() -> None:
    """Whatever is added to the mean square for safety is small next to that of 0.05."""
    layer = talking(scaled, torch.bfloat16)
    indices, x = ids("plain"), 0.05 * torch.randn(T, H).bfloat16().float()
    weights = torch.rand(T, K)
    said = layer(x.bfloat16(), indices, weights).float() - scaled(x, indices, weights)
    wide = copy.deepcopy(layer).float()
    expected = wide(x, indices, weights) - scaled(x, indices, weights)
    tolerance = narrow_tolerance(layer, torch.bfloat16, expected)
    assert_close(said, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("hidden", "tokens", "top_k"), [(37, 2100, 2), (16, 700, 4), (40, 850, 3), (16, 601, 17)]
)
def test_the_same_bits_for_any_number_of_threads(hidden: int, tokens: int, top_k: int) -> None:
    experts = max(6, top_k)
    layer = ExpertCommunication(Experts(hidden, 8, experts), hidden, experts, size=32)
    nn.init.normal_(layer.out_proj)
    assert tokens * top_k * layer.size >= 65536
    indices = torch.rand(tokens, experts).argsort(dim=1)[:, :top_k].contiguous()
    indices[::5, 0] = -1
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, top_k)
    seen = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        seen.append(run(layer, layer, indices, x, weights))
    for other in seen[1:]:
        for name, value in seen[0].items():
            assert torch.equal(value, other[name]), name


def by_state_dict(layer: ExpertCommunication) -> ExpertCommunication:
    return load_state(talking(stacked()), layer)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_state_dict])
def test_copies_are_the_same_layer_and_share_nothing(
    copied: Callable[[ExpertCommunication], ExpertCommunication],
) -> None:
    layer = talking(stacked())
    other = copied(layer)
    arguments = torch.randn(T, H, dtype=F64), ids("dropped"), torch.rand(T, K, dtype=F64)
    y = layer(*arguments)
    assert torch.equal(other(*arguments), y)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert torch.equal(layer(*arguments), y)


def test_state_dict_names() -> None:
    assert {name: tuple(value.shape) for name, value in talking(scaled).state_dict().items()} == {
        "qkv_proj": (3 * SIZE, H),
        "out_proj": (H, SIZE),
    }
    assert "experts.down_proj" in talking(stacked()).state_dict()


def test_meta_device_to_empty_reset_parameters() -> None:
    with torch.device("meta"):
        layer = ExpertCommunication(Experts(H, INNER, E), H, E)
        y = layer(torch.empty(T, H), torch.empty(T, K, dtype=torch.int64), torch.empty(T, K))
    assert y.is_meta
    assert y.shape == (T, H)
    layer = layer.to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(torch.nan)
    layer.reset_parameters()
    bound = 1 / math.sqrt(H)
    assert 0.9 * bound < layer.qkv_proj.abs().max() <= bound
    assert (layer.out_proj == 0).all()
    assert all(tensor.isfinite().all() for tensor in layer.state_dict().values())
    talking(scaled).reset_parameters()  # experts without parameters


def test_device_and_dtype_arguments() -> None:
    layer = ExpertCommunication(scaled, H, E, device="meta", dtype=torch.bfloat16)
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert all(parameter.dtype == torch.bfloat16 for parameter in layer.parameters())


def test_extra_repr() -> None:
    sizes = f"hidden_size={H}, num_experts={E}, size={SIZE}, num_heads={HEADS}"
    assert sizes in repr(talking(stacked()))
    assert "(experts): Experts(" in repr(talking(stacked()))
    assert f"{sizes}, experts=<function scaled" in repr(talking(scaled))


# ---- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": 0}, ValueError, "size must be >= 1, got 0"),
        ({"num_heads": 0}, ValueError, "num_heads must be >= 1, got 0"),
        ({"size": 2.0}, TypeError, r"size must be an int, got 2\.0"),
        ({"size": 10, "num_heads": 4}, ValueError, "num_heads must divide size 10, got 4"),
    ],
)
def test_errors(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^ExpertCommunication: {message}$"):
        ExpertCommunication(scaled, H, E, **options)


def test_sizes_of_another_layer_are_refused() -> None:
    for sizes, message in (
        ((H + 1, E), f"experts must have hidden_size {H + 1}, got {H}"),
        ((H, E + 1), f"experts must have num_experts {E + 1}, got {E}"),
        ((0, E), "hidden_size must be >= 1, got 0"),
        ((H, 0), "num_experts must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=f"^ExpertCommunication: {message}$"):
            ExpertCommunication(stacked(), *sizes)
    with pytest.raises(ValueError, match=f"MoE: experts must have num_experts {E - 1}, got {E}"):
        MoE(H, None, E - 1, K, experts=talking(stacked()))
