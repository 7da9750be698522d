"""Experts that talk: the formula by loops, who takes part, and that it behaves as a module."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from copies import by_pickle, load_state
from plain_moe import gradients
from torchmoe.nn import (
    Assistance,
    Capacity,
    ExpertCommunication,
    ExpertList,
    Experts,
    Gate,
    MoE,
    Router,
    known_estimators,
)
from torchmoe.nn.estimators.estimator import ExpertFunction
from torchmoe.nn.estimators.registry import build_estimator
from torchmoe.testing import gradcheck

H, INNER, E, K, T, SIZE, HEADS = 6, 7, 5, 3, 23, 8, 2
F64 = torch.float64
ALONE = [name for name in known_estimators() if build_estimator(name).takes_experts_alone]
TOGETHER = [name for name in known_estimators() if name not in ALONE]

pytestmark = pytest.mark.usefixtures("one_thread")


def stacked(dtype: torch.dtype = F64) -> Experts:
    return Experts(H, INNER, E, bias=True, dtype=dtype)


def listed() -> ExpertList:
    return ExpertList(nn.Sequential(nn.Linear(H, H, dtype=F64), nn.Tanh()) for _ in range(E))


def scaled(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Experts that are a plain function: expert e multiplies by e + 1 and turns the entries."""
    routed = (indices >= 0) & (indices < E)
    factor = (weights * (indices + 1)).masked_fill(~routed, 0).sum(1, keepdim=True)
    return (factor * x.roll(1, dims=1)).to(x.dtype)


def talking(
    experts: ExpertFunction, dtype: torch.dtype = F64, **options: int
) -> ExpertCommunication:
    """A layer past its start, with differences between slots that a softmax notices."""
    options = {"size": SIZE, "num_heads": HEADS} | options
    layer = ExpertCommunication(experts, H, E, dtype=dtype, **options)
    with torch.no_grad():
        layer.qkv_proj.normal_()
        layer.out_proj.normal_()
    return layer


def ids(situation: str) -> Tensor:
    """Expert ids [T, K]."""
    if situation == "no_tokens":
        return torch.empty(0, K, dtype=torch.int64)
    chosen = torch.rand(T, E).argsort(dim=1)
    if situation == "top1":
        return chosen[:, :1].contiguous()
    if situation == "all_experts":
        return chosen
    chosen = chosen[:, :K].contiguous()
    if situation == "dropped":
        chosen[torch.rand(T, K) < 0.3] = -1
        chosen[0] = -1
        chosen[1] = torch.tensor([-1, 2, -1])
        chosen[2] = torch.tensor([-1, 2, 0])
    elif situation == "one_each":
        chosen[:, [0, 2]] = -1
    elif situation == "all_dropped":
        chosen.fill_(-1)
    elif situation == "repeated":
        chosen[:, 2] = chosen[:, 0]
        chosen[0] = 4
    elif situation == "out_of_range":
        chosen[0] = torch.tensor([E, 1, -7])
        chosen[1] = torch.tensor([torch.iinfo(torch.int64).max, 0, 3])
        chosen[2, 0] = torch.iinfo(torch.int64).min
    return chosen


SITUATIONS = (
    "plain",
    "dropped",
    "one_each",
    "all_dropped",
    "repeated",
    "out_of_range",
    "top1",
    "all_experts",
    "no_tokens",
)


def plain(layer: ExpertCommunication, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The layer as loops over tokens, slots and heads."""
    wide = layer.size // layer.num_heads
    y = 0 * (x + weights.sum())
    for t in range(x.shape[0]):
        slots = [j for j in range(indices.shape[1]) if 0 <= indices[t, j] < layer.num_experts]
        one = weights.new_ones(1, 1)
        outputs = {
            j: layer.experts(x[t : t + 1], indices[t : t + 1, j : j + 1], one)[0] for j in slots
        }
        row = torch.zeros_like(x[t])
        for j in slots:
            heard = torch.zeros_like(x[t])
            for head in range(layer.num_heads):
                part = slice(head * wide, (head + 1) * wide)
                q, k, v = (
                    {
                        i: projection[part] @ (o / (o.square().mean() + eps(x.dtype)).sqrt())
                        for i, o in outputs.items()
                    }
                    for projection in layer.qkv_proj.chunk(3)
                )
                scores = torch.stack([q[j] @ k[i] for i in slots]) / math.sqrt(wide)
                values = torch.stack([v[i] for i in slots])
                heard = heard + layer.out_proj[:, part] @ (scores.softmax(0) @ values)
            row = row + weights[t, j] * (outputs[j] + (heard if len(slots) > 1 else 0))
        y[t] = row
    return y


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def run(
    layer: Callable[[Tensor, Tensor, Tensor], Tensor],
    module: nn.Module,
    indices: Tensor,
    x: Tensor,
    weights: Tensor,
) -> dict[str, Tensor]:
    """The output and every gradient."""
    module.zero_grad()
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = layer(x, indices, weights)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad, **copy.deepcopy(found)}


def check_against_loops(layer: ExpertCommunication, indices: Tensor) -> None:
    x = torch.randn(indices.shape[0], H, dtype=F64)
    weights = torch.rand(indices.shape, dtype=F64)
    got = run(layer, layer, indices, x, weights)
    expected = run(lambda *args: plain(layer, *args), layer, indices, x, weights)
    for name, value in got.items():
        # What no loop reached has no gradient there and one of zeros here.
        assert_close(value, expected.get(name, torch.zeros_like(value)), msg=name)


# ---- the formula


@pytest.mark.parametrize("situation", SITUATIONS)
def test_equals_a_loop_over_tokens_slots_and_heads(situation: str) -> None:
    check_against_loops(talking(stacked()), ids(situation))


@pytest.mark.parametrize("experts", [listed, lambda: scaled], ids=["list", "function"])
@pytest.mark.parametrize("num_heads", [1, 2, 8])
def test_any_experts_and_any_number_of_heads(
    experts: Callable[[], ExpertFunction], num_heads: int
) -> None:
    check_against_loops(talking(experts(), num_heads=num_heads), ids("dropped"))


def test_slots_matter_to_each_other() -> None:
    """What one slot chose changes the output by more than its own part."""
    layer = talking(stacked())
    x = torch.randn(T, H, dtype=F64)
    weights = torch.tensor([1.0, 0.0, 0.0], dtype=F64).expand(T, K)
    indices = ids("plain")
    other = indices.clone()
    other[:, 1] = -1
    change = (layer(x, indices, weights) - layer(x, other, weights)).abs().amax(dim=1)
    assert (change > 1e-3).all()


def test_the_order_of_the_slots_means_nothing() -> None:
    layer = talking(stacked())
    indices, x = ids("dropped"), torch.randn(T, H, dtype=F64)
    weights = torch.rand(T, K, dtype=F64)
    shuffle = torch.rand(T, K).argsort(dim=1)
    assert_close(
        layer(x, indices.gather(1, shuffle), weights.gather(1, shuffle)), layer(x, indices, weights)
    )


def test_tokens_do_not_see_each_other() -> None:
    layer = talking(stacked())
    indices, x = ids("dropped"), torch.randn(T, H, dtype=F64)
    weights = torch.rand(T, K, dtype=F64)
    whole = layer(x, indices, weights)
    for t in range(T):
        one = slice(t, t + 1)
        assert_close(layer(x[one], indices[one], weights[one]), whole[one])


def test_the_outputs_length_does_not_change_what_is_said() -> None:
    """Queries, keys and values are of directions: the exchange alone is the same for 1000 x."""
    layer = talking(scaled)
    indices, x = ids("plain"), torch.randn(T, H, dtype=F64)
    weights = torch.rand(T, K, dtype=F64)
    said = [layer(f * x, indices, weights) - scaled(f * x, indices, weights) for f in (1.0, 1000.0)]
    assert said[0].abs().max() > 0.1
    # The difference cancels what is 1000 times as large.
    assert_close(said[0], said[1], rtol=1e-9, atol=1e-9)


# ---- who takes part


@pytest.mark.parametrize("situation", ["one_each", "all_dropped", "top1"])
def test_nobody_to_talk_to(situation: str) -> None:
    """The layer is the one without, and the projections get a gradient of zeros."""
    layer = talking(stacked(torch.float32), torch.float32)
    indices, x = ids(situation), torch.randn(T, H)
    weights = torch.rand(indices.shape)
    got = run(layer, layer, indices, x, weights)
    expected = run(layer.experts, layer.experts, indices, x, weights)
    for name in ("y", "x", "weights"):
        assert_close(got[name], expected[name], rtol=0, atol=close_to(layer.experts, x, indices))
    assert (got["qkv_proj"] == 0).all()
    assert (got["out_proj"] == 0).all()


def close_to(experts: Experts, x: Tensor, indices: Tensor) -> float:
    """Sums of at most 2 * INNER + K terms in another order, each below the largest output."""
    everyone = torch.arange(E).expand(x.shape[0], E)
    largest = experts(x, everyone, torch.ones(everyone.shape)).abs().max().item()
    return (2 * INNER + indices.shape[1]) * eps(x.dtype) * max(1.0, largest) * H


@pytest.mark.parametrize("situation", SITUATIONS)
def test_starts_as_the_layer_without(situation: str) -> None:
    """Up to rounding: without, the experts' last sum and that over the slots are one."""
    layer = ExpertCommunication(stacked(torch.float32), H, E)
    indices = ids(situation)
    x, weights = torch.randn(indices.shape[0], H), torch.rand(indices.shape)
    y = layer(x, indices, weights)
    tolerance = close_to(layer.experts, x, indices) if len(x) else 0.0
    assert_close(y, layer.experts(x, indices, weights), rtol=0, atol=tolerance)
    y.square().sum().backward()
    assert (layer.qkv_proj.grad == 0).all()
    learns = situation not in ("one_each", "all_dropped", "top1", "no_tokens")
    assert (layer.out_proj.grad != 0).any() == learns


def test_the_weight_of_a_slot_that_is_not_routed_is_ignored() -> None:
    layer = talking(stacked())
    indices, x = ids("dropped"), torch.randn(T, H, dtype=F64)
    weights = torch.rand(T, K, dtype=F64)
    expected = run(layer, layer, indices, x, weights)
    got = run(layer, layer, indices, x, weights.masked_fill(indices < 0, torch.nan))
    assert_close(got, expected, rtol=0, atol=0)
    assert (got["weights"][indices < 0] == 0).all()


def test_a_mask_over_nan_padding() -> None:
    moe = moe_of(talking(stacked()))
    x = torch.randn(T, H, dtype=F64)
    mask = torch.rand(T) > 0.4
    padded = x.masked_fill(~mask[:, None], torch.nan).requires_grad_()
    output = moe(padded, token_mask=mask)
    (output.hidden_states.square().sum() + output.aux_loss).backward()
    assert (output.hidden_states[~mask] == 0).all()
    assert_close(output.hidden_states[mask], moe(x[mask]).hidden_states)
    assert (padded.grad[~mask] == 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients(moe).values())


# ---- in a layer


def moe_of(experts: ExpertCommunication, **options: object) -> MoE:
    options = {"router": Router(H, E, dtype=F64), "dtype": F64} | options
    return MoE(H, None, E, K, experts=experts, **options)


@pytest.mark.parametrize("estimator", TOGETHER)
def test_with_capacity_assistance_and_shared_experts(estimator: str) -> None:
    moe = moe_of(
        talking(stacked()),
        gate=Gate(estimator=estimator),
        capacity=Capacity(1.2),
        assistance=Assistance((1, 2, 3, 4, 0)),
        shared_experts=nn.Linear(H, H, dtype=F64),
        router=Router(H, E, track_usage=True, dtype=F64),
    )
    moe.assistance.assisted.fill_(True)
    x = torch.randn(T, H, dtype=F64)
    output = moe(x)
    routing = output.routing
    assert (routing.indices < 0).any()
    assert (routing.indices[:, -1] >= 0).any()
    expected = plain(moe.experts, x, routing.indices, routing.weights) + moe.shared_experts(x)
    assert_close(output.hidden_states, expected)
    (output.hidden_states.square().sum() + output.aux_loss).backward()
    assert all((gradient != 0).any() for gradient in gradients(moe).values())


@pytest.mark.parametrize("estimator", ALONE)
def test_refuses_estimators_that_need_each_experts_output_alone(estimator: str) -> None:
    kind = type(build_estimator(estimator)).__name__
    with pytest.raises(ValueError, match=r"^MoE: ") as caught:
        moe_of(talking(stacked()), gate=Gate(estimator=estimator))
    assert str(caught.value) == (
        "MoE: gate.estimator must not need the output of each expert alone with "
        f"ExpertCommunication, where it depends on the token's other experts, got {kind}"
    )
    assert set(ALONE) == {"default_vector", "straight_through_dense"}


# ---- gradients


@pytest.mark.parametrize("situation", ["dropped", "repeated", "top1"])
def test_gradients_of_every_parameter_of_x_and_of_the_weights(situation: str) -> None:
    indices = ids(situation)[:5]
    x, weights = torch.randn(5, H), torch.rand(indices.shape)
    assert gradcheck(talking(Experts(H, 2, E, activation="gelu")), [x, indices, weights])


def test_gradients_of_the_layer() -> None:
    moe = moe_of(talking(stacked()), capacity=Capacity(0.9))
    assert gradcheck(moe, torch.randn(6, H), fast_mode=True)


def test_double_backward_is_right_where_the_experts_have_one() -> None:
    layer = talking(listed())
    indices = ids("dropped")[:4]
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, values, (x, indices, weights))

    tensors = [torch.randn(4, H, dtype=F64), torch.rand(indices.shape, dtype=F64)]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    # Token 0 has no routed slot, so that its outputs have no direction.
    parameters = [p.detach().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradgradcheck(call, [*tensors, *parameters], fast_mode=True)


def test_double_backward_is_refused_where_the_experts_refuse_it() -> None:
    layer = talking(stacked())
    x = torch.randn(T, H, dtype=F64, requires_grad=True)
    y = layer(x, ids("plain"), torch.rand(T, K, dtype=F64))
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="expert_mlp"):
        gradient.sum().backward()


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
    """Ten numbers in a row are rounded to dtype, each as large as the longest sum that meets it.

    x, the four products of the experts and the projections with their operands, and the two sums.
    """
    return (
        10 * eps(dtype) * max(1.0, layer.out_proj.abs().sum(1).max().item(), y.abs().max().item())
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
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
