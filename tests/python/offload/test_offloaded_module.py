"""Offloaded experts as a module: in a layer, in a state dict, copied, moved, refused."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamed import Pair, assert_same, drawn, pair, slots_of
from torchmoe.nn import Assistance, Capacity, ExpertList, Experts, Gate, MoE, SharedExperts
from torchmoe.nn.estimators.registry import known_estimators
from torchmoe.offload import ExpertStore, offload, write_store

H, INNER, E, K = 8, 12, 8, 2


def frozen(**options: Any) -> MoE:
    moe = MoE(H, INNER, E, K, **options)
    moe.experts.requires_grad_(False)
    return moe


def with_offloaded(moe: MoE, num_slots: int = 3) -> MoE:
    other = copy.deepcopy(moe)
    other.experts = offload(other.experts, budget=slots_of(moe.experts, num_slots))
    return other


def gradients_of(moe: MoE, x: torch.Tensor, **given: Any) -> list[torch.Tensor]:
    torch.manual_seed(1)
    moe.zero_grad()
    x = x.clone().requires_grad_()
    output = moe(x, **given)
    (output.hidden_states.square().sum() + output.aux_loss).backward()
    learned = [p.grad for p in moe.parameters() if p.grad is not None]
    return [output.hidden_states.detach(), x.grad, *learned]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"capacity": Capacity(0.7)},
        {"capacity": Capacity(0.7, overflow="next_best")},
        {"assistance": Assistance([1, 2, 3, 4, 5, 6, 7, 0])},
        {"shared_experts": SharedExperts(H, INNER), "routed_scaling_factor": 2.5},
    ],
    ids=["plain", "dropped", "rerouted", "assisted", "shared"],
)
def test_in_a_layer(options: dict[str, Any]) -> None:
    moe = frozen(**copy.deepcopy(options))
    other = with_offloaded(moe)
    x = torch.randn(3, 10, H)
    mask = torch.rand(3, 10) < 0.8
    for given in ({}, {"token_mask": mask}):
        expected, actual = gradients_of(moe, x, **given), gradients_of(other, x, **given)
        assert len(expected) == len(actual) >= 3
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert other.experts.misses > 0


@pytest.mark.parametrize("estimator", known_estimators())
def test_every_estimator(estimator: str) -> None:
    """Also those that call every expert, which then are read in each backward pass."""
    moe = frozen(gate=Gate(estimator=estimator), dtype=torch.float64)
    other = with_offloaded(moe)
    x = torch.randn(20, H, dtype=torch.float64)
    expected, actual = gradients_of(moe, x), gradients_of(other, x)
    assert len(expected) == len(actual)
    for a, e in zip(actual, expected, strict=True):
        # The op for dense gradients adds up in another order than one call for each expert.
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_sizes_are_checked() -> None:
    experts = pair().offloaded
    with pytest.raises(ValueError, match=r"^MoE: experts must have num_experts 7, got 8$"):
        MoE(H, None, 7, K, experts=experts)
    with pytest.raises(ValueError, match=r"^MoE: experts must have hidden_size 9, got 8$"):
        MoE(9, None, E, K, experts=experts)


def test_settings_stay() -> None:
    experts = pair(num_slots=3, policy="lru").offloaded
    for name in ("hidden_size", "intermediate_size", "num_experts", "num_slots", "budget"):
        with pytest.raises(AttributeError, match=rf"^OffloadedExperts: {name} must stay "):
            setattr(experts, name, getattr(experts, name) + 1)
    for name in ("activation", "policy", "store"):
        with pytest.raises(AttributeError, match=rf"^OffloadedExperts: {name} must stay "):
            setattr(experts, name, "other")
    assert experts.dtype == torch.float32
    for part in ("num_experts=8", "activation='swiglu'", "num_slots=3", "policy='lru'"):
        assert part in repr(experts)


def test_a_state_dict_is_that_of_the_experts() -> None:
    given = pair()
    model = nn.ModuleDict({"experts": given.offloaded, "head": nn.Linear(2, 2)})
    state = model.state_dict()
    expected = given.resident.state_dict()
    assert list(given.offloaded.state_dict()) == list(expected)
    for name, value in expected.items():
        assert torch.equal(state["experts." + name], value)
    assert given.offloaded.bytes_read == 0
    copied = copy.deepcopy(given.resident)
    nn.init.zeros_(copied.down_proj)
    copied.load_state_dict(given.offloaded.state_dict())
    assert torch.equal(copied.down_proj, given.resident.down_proj)


def test_a_state_dict_of_the_same_values_is_accepted() -> None:
    given = pair()
    model = nn.ModuleDict({"experts": given.offloaded, "head": nn.Linear(2, 2)})
    state = model.state_dict()
    state["head.bias"] = torch.ones(2)
    model.load_state_dict(state)
    assert torch.equal(model["head"].bias, torch.ones(2))
    without = {name: value for name, value in state.items() if "experts" not in name}
    assert not any(model.load_state_dict(without))
    assert_same(given, drawn(given.resident, 10, 2))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.clone().index_fill_(0, torch.tensor([5]), 1.0),
        lambda t: t[1:],
        lambda t: t.double(),
        lambda t: t.to("meta"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_other_values_are_refused(strict: bool, change: Callable[..., Any]) -> None:
    given = pair()
    model = nn.ModuleDict({"experts": given.offloaded})
    state = model.state_dict()
    state["experts.down_proj"] = change(state["experts.down_proj"])
    message = "OffloadedExperts: experts.down_proj must have the values of the store"
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, strict=strict)


def test_negative_zero_and_nan_are_values() -> None:
    experts = Experts(2, 3, 2).requires_grad_(False)
    with torch.no_grad():
        experts.down_proj.zero_()[0, 0, 0] = torch.nan
    offloaded = offload(experts, budget=1 << 30)
    state = offloaded.state_dict()
    offloaded.load_state_dict(state)
    state["down_proj"][1, 0, 0] = -0.0
    with pytest.raises(RuntimeError, match="down_proj must have the values of the store"):
        offloaded.load_state_dict(state)


def test_deep_copies_share_the_store() -> None:
    given = pair(num_slots=2)
    call = drawn(given.resident, 20, 2)
    assert_same(given, call)
    copied = copy.deepcopy(given.offloaded)
    assert copied.hits == copied.misses == copied.resident_bytes == 0
    assert copied._file is given.offloaded._file
    before = given.offloaded.misses
    assert_same(Pair(given.resident, copied), call)
    assert given.offloaded.misses == before
    moe = MoE(H, None, E, K, experts=given.offloaded)
    x = torch.randn(5, H)
    assert torch.equal(copy.deepcopy(moe)(x).hidden_states, moe(x).hidden_states)


@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: MoE(H, None, E, K, experts=e)])
def test_pickling_is_refused(wrap: Callable[[Any], nn.Module]) -> None:
    module = wrap(pair().offloaded)
    for save in (pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
        with pytest.raises(TypeError, match=r"^OffloadedExperts: a module must be pickled before"):
            save(module)


@pytest.mark.parametrize("move", ["half", "double", "bfloat16"])
def test_other_dtypes_are_refused(move: str) -> None:
    moe = MoE(H, None, E, K, experts=pair().offloaded)
    with pytest.raises(RuntimeError, match=r"^OffloadedExperts: the experts must stay as the"):
        getattr(moe, move)()
    with pytest.raises(RuntimeError, match=r"^OffloadedExperts: the experts must stay .* on meta"):
        moe.to("meta")


def test_moves_that_change_nothing() -> None:
    given = pair()
    moe = MoE(H, None, E, K, experts=given.offloaded)
    assert moe.cpu().float().to("cpu").to(torch.float32).experts is given.offloaded
    moe.requires_grad_(True).train().eval()
    assert_same(given, drawn(given.resident, 10, 2))


def test_first_values_are_refused() -> None:
    moe = MoE(H, None, E, K, experts=pair().offloaded)
    with pytest.raises(RuntimeError, match=r"^OffloadedExperts: reset_parameters must be called"):
        moe.reset_parameters()


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        (0, lambda x: x[0], r"^expert_mlp: x must be \[num_tokens, hidden_size\], got shape"),
        (0, lambda x: x[:, 1:], r"^expert_mlp: w_out must be .*, got shape"),
        (0, lambda x: x.int(), r"^expert_mlp: x must be float32, .*, got Int"),
        (0, lambda x: x[1:], r"^expert_mlp: indices must be .*, got shape"),
        (1, lambda i: i.int(), r"^expert_mlp: indices must be Long, got Int"),
        (1, lambda i: i[:, 1:], r"^expert_mlp: weights must be .*, got shape"),
        (2, lambda w: w.half(), r"^expert_mlp: weights must be .*, got Half"),
        (0, lambda x: x.to("meta"), r"^OffloadedExperts: x must be on .* \(cpu\), got meta$"),
        (1, lambda i: i.to("meta"), r"^OffloadedExperts: indices must be on .* \(cpu\), got meta$"),
        (2, lambda w: w.to("meta"), r"^OffloadedExperts: weights must be on .* \(cpu\), got meta$"),
    ],
)
def test_what_a_call_refuses(argument: int, change: Callable[..., Any], message: str) -> None:
    experts = pair().offloaded
    call = list(drawn(experts, 10, 2)[:3])
    call[argument] = change(call[argument])
    with pytest.raises(RuntimeError, match=message):
        experts(*call)
    assert experts.hits == experts.misses == 0


@pytest.mark.parametrize("argument", range(3))
def test_what_is_no_tensor(argument: int) -> None:
    experts = pair().offloaded
    call: list[Any] = list(drawn(experts, 10, 2)[:3])
    call[argument] = None
    with pytest.raises(TypeError, match=r"^expert_mlp: \w+ must be a tensor, got None$"):
        experts(*call)


def test_trainable_experts_are_refused(tmp_path: Path) -> None:
    """And nothing is written or freed."""
    experts = Experts(4, 5, 3)
    path = tmp_path / "store.safetensors"
    for name in ("gate_up_proj", "down_proj"):
        experts.requires_grad_(False)
        getattr(experts, name).requires_grad_(True)
        message = rf"^offload: experts must be frozen, .*, got {name} that requires a gradient$"
        with pytest.raises(ValueError, match=message):
            offload(experts, budget=1 << 30, store=path)
    assert not list(tmp_path.iterdir())
    assert not experts.down_proj.is_meta


class Subclass(Experts):
    """Whose forward pass could be another one."""


@pytest.mark.parametrize(
    ("experts", "name"),
    [
        (lambda: ExpertList([nn.Linear(2, 2)]), "ExpertList"),
        (lambda: MoE(2, 3, 4, 2), "MoE"),
        (lambda: Subclass(2, 3, 4), "Subclass"),
        (lambda: pair().offloaded, "OffloadedExperts"),
        (lambda: None, "None"),
    ],
)
def test_other_experts_are_refused(experts: Callable[[], Any], name: str) -> None:
    message = rf"^offload: experts must be torchmoe.nn.Experts, got {name}$"
    with pytest.raises(TypeError, match=message):
        offload(experts(), budget=1 << 30)


def test_a_trace_goes_with_its_policy() -> None:
    experts = Experts(4, 5, 3).requires_grad_(False)
    with pytest.raises(TypeError, match=r'^offload: trace must be a list for policy "oracle", got'):
        offload(experts, budget=1 << 30, policy="oracle")
    with pytest.raises(ValueError, match=r'^offload: trace must be None for policy "lru", got'):
        offload(experts, budget=1 << 30, policy="lru", trace=[[1]])
    with pytest.raises(ValueError, match=r"^offload: trace must hold ids in \[0, 3\), got 3 in"):
        offload(experts, budget=1 << 30, policy="oracle", trace=[[1], [3]])
    with pytest.raises(TypeError, match=r"^offload: trace must hold ids, got 1.5 in call 0"):
        offload(experts, budget=1 << 30, policy="oracle", trace=[[1.5]])
    assert not experts.down_proj.is_meta


def test_experts_that_were_never_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "store.safetensors"
    resident = Experts(H, INNER, E, bias=True).requires_grad_(False)
    like = Experts(H, INNER, E, bias=True, device="meta").requires_grad_(False)
    write_store(path, like, lambda e: {n: p[e] for n, p in resident.named_parameters()})
    offloaded = offload(like, budget=slots_of(resident, 2), store=path)
    assert_same(Pair(resident, offloaded), drawn(resident, 30, 2))
    with pytest.raises(ValueError, match=r"^offload: store must be given for experts on the meta"):
        offload(like, budget=1 << 30)
    with pytest.raises(FileNotFoundError, match="other"):
        offload(like, budget=1 << 30, store=tmp_path / "other")


def test_where_experts_compute(tmp_path: Path) -> None:
    path = tmp_path / "store.safetensors"
    given = pair(store=path)
    like = Experts(H, INNER, E, bias=True, device="meta").requires_grad_(False)
    budget = slots_of(given.resident, 3)
    for device in (None, "cpu", torch.device("cpu")):
        experts = offload(like, budget=budget, store=path, device=device)
        assert experts.device == given.offloaded.device == torch.device("cpu")
        assert "device='cpu'" in repr(experts)
    assert offload(Experts(4, 5, 3).requires_grad_(False), budget=1 << 20, device="cpu")
    message = r"^offload: device must be the CPU or a CUDA device, got meta$"
    with pytest.raises(ValueError, match=message):
        offload(like, budget=budget, store=path, device="meta")
    like.down_proj = nn.Parameter(torch.empty(E, H, INNER), requires_grad=False)
    message = r"^offload: experts must be on the CPU, on one CUDA .* device, got cpu and meta$"
    with pytest.raises(ValueError, match=message):
        offload(like, budget=budget, store=path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch that has no CUDA device")
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    experts = Experts(4, 5, 3).requires_grad_(False)
    for device in ("cuda", "cuda:7"):
        message = f"^offload: device must be one that torch can use, got {device}$"
        with pytest.raises(RuntimeError, match=message):
            offload(experts, budget=1 << 20, store=tmp_path / "store", device=device)
    assert not list(tmp_path.iterdir())
    assert not experts.down_proj.is_meta


def test_two_modules_read_one_store(tmp_path: Path) -> None:
    path = tmp_path / "store.safetensors"
    given = pair(store=path, num_slots=3)
    like = Experts(H, INNER, E, bias=True, device="meta").requires_grad_(False)
    other = offload(like, budget=slots_of(given.resident, 1), store=path)
    call = drawn(given.resident, 20, 2)
    assert_same(given, call)
    assert_same(Pair(given.resident, other), call)
    ExpertStore.open(path, like).close()


def test_the_package_is_loaded_by_those_who_ask_for_it() -> None:
    script = "import sys, torchmoe; assert 'torchmoe.offload' not in sys.modules"
    script += "; import torchmoe.offload; loaded = set(sys.modules)"
    script += "; assert not {'safetensors', 'torch._dynamo'} & loaded"
    subprocess.run([sys.executable, "-c", script], check=True)
