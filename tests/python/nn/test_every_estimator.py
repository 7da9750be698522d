"""What every built-in estimator keeps, whatever its formula."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import torchmoe.nn
from built_in import ESTIMATORS
from float_types import AUTOCAST
from plain_moe import gradients, tensors_of
from torchmoe.nn import (
    Balance,
    Capacity,
    Estimator,
    ExpertList,
    Gate,
    MoE,
    MoEOutput,
    Router,
    known_estimators,
)
from torchmoe.nn.estimators.estimator import ExpertFunction

H, INNER, E, K, T = 6, 7, 5, 2, 23
F64 = torch.float64
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)


def make(name: str, top_k: int = K, num_experts: int = E, **options: Any) -> MoE:
    gate = Gate(estimator=name, **options.pop("gate", {}))
    return MoE(H, INNER, num_experts, top_k, bias=True, gate=gate, **options)


def warmed(moe: MoE, seed: int = 0) -> MoE:
    """With state, if there is any, that is not what it starts as."""
    torch.manual_seed(seed)
    moe.update(moe(torch.randn(T, H, dtype=moe.router.weight.dtype)).routing)
    return moe


def step(
    moe: MoE, x: Tensor, run: Callable[..., Any] | None = None, **options: Any
) -> dict[str, Any]:
    """Outputs and gradients of one forward and backward pass, of the layer itself or `run`."""
    moe.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    torch.manual_seed(1)
    output = MoEOutput(*(moe if run is None else run)(leaf, **options))
    (output.hidden_states.square().sum() + output.aux_loss).backward()
    return (
        {"y": output.hidden_states, "aux_loss": output.aux_loss, "x": leaf.grad}
        | tensors_of(output.routing)
        | gradients(moe)
        | dict(enumerate(output.routing.statistics or ()))
    )


def test_every_public_class_has_one_name() -> None:
    public = {
        kind
        for name in torchmoe.nn.__all__
        if inspect.isclass(kind := getattr(torchmoe.nn, name)) and issubclass(kind, Estimator)
    }
    assert known_estimators()[: len(ESTIMATORS)] == tuple(ESTIMATORS)
    assert len({*ESTIMATORS.values()}) == len(ESTIMATORS)
    assert {*ESTIMATORS.values()} == public - {Estimator}


@every_estimator
@pytest.mark.parametrize("token_mask", [False, True])
def test_compiles_once_for_all_token_counts(name: str, token_mask: bool) -> None:
    moe = warmed(make(name, capacity=Capacity(1.1)))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for num_tokens in (11, 17, 40):
        x = torch.randn(num_tokens, H)
        mask = torch.rand(num_tokens) > 0.3 if token_mask else None
        assert_close(step(moe, x, compiled, token_mask=mask), step(moe, x, token_mask=mask))
        graphs.append(counter.frame_count)
    # torch 2.11 starts again to take a float that is compared, the jitter, for a constant.
    assert graphs[0] <= (2 if name == "sparsemixer" else 1)
    assert graphs == graphs[:1] * 3


@pytest.mark.slow
@every_estimator
def test_inductor(name: str) -> None:
    moe = warmed(make(name)).eval()  # inductor draws other noise
    compiled = torch.compile(moe, fullgraph=True, dynamic=True)
    x = torch.randn(T, H)
    assert_close(step(moe, x, compiled), step(moe, x))


@every_estimator
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_replays_the_same_numbers(name: str, use_reentrant: bool) -> None:
    moe = warmed(make(name, capacity=Capacity(1.1)))
    calls = []
    moe.router.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(T, H)
    before = copy.deepcopy(moe.state_dict())

    expected = step(moe, x)
    actual = step(moe, x, lambda x: checkpoint(moe, x, use_reentrant=use_reentrant))
    assert len(calls) == 3
    for key in actual:
        assert torch.equal(actual[key], expected[key]), key
    assert_close(moe.state_dict(), before, rtol=0, atol=0)


@every_estimator
@pytest.mark.parametrize("dtype", AUTOCAST)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    moe = warmed(make(name, capacity=Capacity(1.1)))
    x = torch.randn(T, H)
    plain = step(moe, x)
    with torch.autocast("cpu", dtype=dtype):
        output = moe(x)
        assert output.hidden_states.dtype == dtype
        torch.manual_seed(1)
        output = moe(x)
    moe.zero_grad()
    output.hidden_states.float().square().sum().backward()
    # Router, choice and weights are those of float32, bit for bit.
    for key in ("logits", "weights", "selected", "indices"):
        assert torch.equal(getattr(output.routing, key), plain[key]), key
    torch.manual_seed(1)
    moe.zero_grad()
    moe(x).hidden_states.square().sum().backward()
    expected = gradients(moe)
    torch.manual_seed(1)
    moe.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        y = moe(x).hidden_states
    y.float().square().sum().backward()
    for key, gradient in gradients(moe).items():
        assert gradient.dtype == torch.float32
        scale = expected[key].abs().max().item()
        assert_close(gradient, expected[key], rtol=0, atol=max(0.1 * scale, 1e-3))


@every_estimator
def test_narrow_parameters(name: str) -> None:
    moe = warmed(make(name))
    wide = {key: value.clone() for key, value in moe.estimator.state_dict().items()}
    moe.bfloat16()
    for key, value in moe.estimator.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, wide[key])
    seen = step(moe, torch.randn(T, H, dtype=torch.bfloat16))
    assert seen["y"].dtype == torch.bfloat16
    assert all(value.isfinite().all() for value in seen.values())
    moe.double()
    assert all(value.dtype == F64 for value in moe.estimator.state_dict().values())


@every_estimator
def test_masked_tokens_have_no_part_in_it(name: str) -> None:
    moe = warmed(make(name, dtype=F64))
    x = torch.randn(T, H, dtype=F64)
    mask = torch.arange(T) % 3 != 0
    seen = []
    for filler in (0.0, 1e3, torch.nan):
        spoiled = x.masked_fill(~mask.unsqueeze(1), filler)
        seen.append(step(moe.eval(), spoiled, token_mask=mask))
    assert (seen[0]["y"][~mask] == 0).all()
    assert (seen[0]["x"][~mask] == 0).all()
    for other in seen[1:]:
        for key in seen[0]:
            assert torch.equal(other[key], seen[0][key]), key
    alone = step(moe, x[mask])
    for key in (*gradients(moe), "aux_loss"):
        assert_close(seen[0][key], alone[key])


@every_estimator
def test_a_masked_tokens_output_gives_no_gradient(name: str) -> None:
    moe = make(name, dtype=F64, balance=Balance(weight=0.0))
    mask = torch.arange(T) > 3
    torch.manual_seed(0)
    y = moe(torch.randn(T, H, dtype=F64), token_mask=mask).hidden_states
    y[~mask].sum().backward()
    assert all((gradient == 0).all() for gradient in gradients(moe).values())


@every_estimator
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"), [(0, 2, 5), (1, 2, 5), (9, 1, 5), (9, 5, 5), (9, 1, 1)]
)
def test_sizes(name: str, num_tokens: int, top_k: int, num_experts: int) -> None:
    moe = make(name, top_k, num_experts)
    seen = step(moe, torch.randn(num_tokens, H))
    assert seen["y"].shape == (num_tokens, H)
    assert all(value.isfinite().all() for value in seen.values())
    ids = seen["selected"].sort(dim=1).values
    assert (ids.diff(dim=1) > 0).all()
    assert ((ids >= 0) & (ids < num_experts)).all()
    moe.update(moe(torch.randn(num_tokens, H)).routing)
    assert all(buffer.isfinite().all() for buffer in moe.buffers())


@every_estimator
@pytest.mark.parametrize("normalize", ["before_drop", "after_drop"])
def test_all_slots_dropped(name: str, normalize: str) -> None:
    moe = warmed(make(name, capacity=Capacity(0.0, normalize=normalize), dtype=F64))
    seen = step(moe, torch.randn(T, H, dtype=F64))
    assert (seen["indices"] == -1).all()
    assert all(value.isfinite().all() for value in seen.values())
    if name != "default_vector":
        assert (seen["y"] == 0).all()


@every_estimator
def test_logits_that_are_no_numbers_stay_with_their_token(name: str) -> None:
    class Logits(nn.Module):
        def __init__(self, logits: Tensor) -> None:
            super().__init__()
            self.logits = logits

        def forward(self, x: Tensor) -> Tensor:
            return self.logits

    clean = torch.randn(T, E, dtype=F64)
    spoiled = clean.clone()
    spoiled[0] = torch.nan
    spoiled[1, 2] = torch.nan
    spoiled[2] = -torch.inf
    spoiled[3, 1:] = -torch.inf
    spoiled[4, 0] = torch.inf
    x = torch.randn(T, H, dtype=F64)
    experts = make(name, dtype=F64).experts
    outputs = []
    for logits in (clean, spoiled):
        gate = Gate(estimator=name)
        moe = MoE(H, None, E, 3, gate=gate, router=Logits(logits), experts=experts, dtype=F64)
        torch.manual_seed(4)
        outputs.append(moe(x))
    ids = outputs[1].routing.selected.sort(dim=1).values
    assert (ids.diff(dim=1) > 0).all()
    assert ((ids >= 0) & (ids < E)).all()
    assert_close(outputs[0].hidden_states[5:], outputs[1].hidden_states[5:])


@every_estimator
def test_number_of_threads_changes_nothing(name: str) -> None:
    moe = MoE(64, 96, 8, 2, capacity=Capacity(1.1), gate=Gate(estimator=name))
    x = torch.randn(512, 64)
    torch.manual_seed(0)
    moe.update(moe(x).routing)
    seen = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        seen.append(step(moe, x))
    for other in seen[1:]:
        for key in seen[0]:
            assert torch.equal(other[key], seen[0][key]), key


@every_estimator
def test_usage_scales_the_routers_gradient(name: str) -> None:
    x = torch.randn(T, H, dtype=F64)
    seen = []
    for scaled in (False, True):
        router = Router(H, E, usage_scaling=scaled, dtype=F64)
        torch.manual_seed(0)
        moe = make(name, dtype=F64, router=router)
        moe.reset_parameters()
        if scaled:
            router.usage.copy_(torch.tensor([0.5, 0.1, 0.0, 0.15, 0.25]))
        seen.append(step(moe, x)["router.weight"])
    assert_close(seen[1], seen[0] * (1 - router.usage).unsqueeze(1))
    assert seen[0].abs().max() > 0


@every_estimator
def test_evaluation_takes_the_largest_logits(name: str) -> None:
    moe = make(name).eval()
    routing = moe(torch.randn(T, H)).routing
    assert torch.equal(routing.selected, routing.logits.topk(K).indices)


@every_estimator
def test_one_gradient_where_all_experts_serve_every_token(name: str) -> None:
    """With K = E and the plain scores as weights nothing is left to estimate."""
    if name == "sparsemixer":
        pytest.skip("its weights are those of draws, not the scores")
    x = torch.randn(T, H, dtype=F64)
    gate = {"normalize": "none"}
    exact = warmed(make("exact", E, gate=gate, dtype=F64))
    other = make(name, E, gate=gate, dtype=F64)
    other.load_state_dict(exact.state_dict(), strict=False)
    expected, actual = step(exact, x), step(other, x)
    for key in ("y", "x", *gradients(exact)):
        assert_close(actual[key], expected[key], rtol=0, atol=1e-12)


class One(nn.Module):
    """An expert of a stack of silu ones, by itself."""

    def __init__(self, stacked: nn.Module, i: int) -> None:
        super().__init__()
        self.w_in = nn.Parameter(stacked.up_proj[i].detach().clone())
        self.b_in = nn.Parameter(stacked.up_proj_bias[i].detach().clone())
        self.w_out = nn.Parameter(stacked.down_proj[i].detach().clone())
        self.b_out = nn.Parameter(stacked.down_proj_bias[i].detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.silu(nn.functional.linear(x, self.w_in, self.b_in))
        return nn.functional.linear(inner, self.w_out, self.b_out)


def with_experts(stacked: MoE, name: str, experts: ExpertFunction) -> MoE:
    """A layer with the same router."""
    moe = MoE(H, None, E, K, gate=Gate(estimator=name), experts=experts, dtype=F64)
    moe.router.load_state_dict(stacked.router.state_dict())
    return moe


@every_estimator
def test_experts_of_any_kind(name: str) -> None:
    """Modules, a function and the stacked experts give the same values."""
    torch.manual_seed(0)
    stacked = make(name, activation="silu", dtype=F64)
    listed = ExpertList(One(stacked.experts, i) for i in range(E))
    x = torch.randn(T, H, dtype=F64)
    expected = step(warmed(stacked), x)
    for experts in (listed, lambda *call: listed(*call)):
        listed.zero_grad()
        actual = step(warmed(with_experts(stacked, name, experts)), x)
        for key in ("y", "x", "router.weight", "weights"):
            assert_close(actual[key], expected[key], rtol=0, atol=1e-12)
        for i, expert in enumerate(listed.experts):
            assert_close(expert.w_in.grad, expected["experts.up_proj"][i], rtol=0, atol=1e-12)


@every_estimator
def test_double_backward_with_experts_of_any_kind(name: str) -> None:
    """The gradient of a gradient, too, is that of experts that are torch's own modules."""
    stacked = make(name, activation="silu", dtype=F64)
    listed = ExpertList(One(stacked.experts, i) for i in range(E))
    x = torch.randn(T, H, dtype=F64)
    found = []
    for moe in (stacked, with_experts(stacked, name, listed)):
        leaf, weight = x.clone().requires_grad_(), moe.router.weight
        output = warmed(moe)(leaf)
        loss = output.hidden_states.square().sum() + output.aux_loss
        first = torch.autograd.grad(loss, [leaf, weight], create_graph=True)
        moe.zero_grad()
        sum(gradient.square().sum() for gradient in first).backward()
        found.append([*first, leaf.grad, weight.grad])
    assert_close(found[0], found[1], rtol=0, atol=1e-10)
    assert all(gradient.abs().max() > 1e-3 for gradient in found[0])
    for i, expert in enumerate(listed.experts):
        for mine, its in (("up_proj", "w_in"), ("down_proj", "w_out"), ("up_proj_bias", "b_in")):
            expected = getattr(stacked.experts, mine).grad[i]
            assert_close(getattr(expert, its).grad, expected, rtol=0, atol=1e-10)


@every_estimator
def test_copies_and_empty_layers(name: str) -> None:
    moe = warmed(make(name))
    other = copy.deepcopy(moe)
    x = torch.randn(T, H)
    one, two = step(moe, x), step(other, x)
    assert all(torch.equal(one[key], two[key]) for key in one)
    fresh = make(name)
    fresh.load_state_dict(moe.state_dict())
    two = step(fresh, x)
    assert all(torch.equal(one[key], two[key]) for key in one)
    with torch.device("meta"):
        empty = make(name)
    assert empty(torch.empty(T, H, device="meta")).hidden_states.shape == (T, H)
    empty = empty.to_empty(device="cpu")
    for tensor in empty.state_dict().values():
        tensor.fill_(torch.nan)
    empty.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in empty.state_dict().values())
    assert all((buffer == 0).all() for buffer in empty.estimator.buffers())


@every_estimator
def test_sigmoid_scores(name: str) -> None:
    gate = {"score_function": "sigmoid"}
    if name == "sparsemixer":
        with pytest.raises(
            ValueError,
            match=r'gate.score_function must be "softmax" for the estimator SparseMixer, .*, '
            r'got "sigmoid"',
        ):
            make(name, gate=gate)
        return
    seen = step(make(name, gate=gate), torch.randn(T, H))
    assert all(value.isfinite().all() for value in seen.values())


@pytest.mark.parametrize("name", ["default_vector", "sparsemixer"])
@pytest.mark.parametrize("normalize", ["topk", "uniform"])
def test_normalisations_they_are_not_defined_for(name: str, normalize: str) -> None:
    with pytest.raises(
        ValueError, match=rf'MoE: gate.normalize must be "none" for .*, whose .*, got "{normalize}"'
    ):
        make(name, gate={"normalize": normalize})
    assert make(name).estimator.normalize == "none"
