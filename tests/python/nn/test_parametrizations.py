"""First values under parametrizations: the layer's own tensors get them, an adapter keeps its."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.testing import assert_close

from torchmoe.nn import (
    CosineRouter,
    ExpertChoiceRouter,
    ExpertCommunication,
    ExpertList,
    Experts,
    MoE,
    Router,
    SequenceRouter,
)

# No two are equal: a bound by the wrong one is seen.
H, INNER, E, K = 6, 40, 5, 2


class LoRA(nn.Module):
    """Adds what an adapter has learnt; has first values of its own, which must not be used."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(*shape[:-1], 2))
        self.b = nn.Parameter(torch.randn(2, *shape[-1:]))

    def reset_parameters(self) -> None:
        raise AssertionError("the adapter was reset")

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.a @ self.b


class Doubled(nn.Module):
    """Stands for a tensor half as large."""

    def forward(self, half: Tensor) -> Tensor:
        return 2 * half

    def right_inverse(self, tensor: Tensor) -> Tensor:
        return tensor / 2


def linear_layer() -> MoE:
    shared = nn.Sequential(nn.Linear(H, INNER), nn.Linear(INNER, H))
    return MoE(H, INNER, E, K, router=nn.Linear(H, E), shared_experts=shared)


PARTS: dict[str, Callable[[], nn.Module]] = {
    "gated experts": lambda: Experts(H, INNER, E),
    "plain experts": lambda: Experts(H, INNER, E, activation="relu", bias=True),
    "router": lambda: Router(H, E, bias=True, track_usage=True),
    "cosine router": lambda: CosineRouter(H, E, projection_size=7),
    "sequence router": lambda: SequenceRouter(Router(H, E)),
    "expert choice router": lambda: ExpertChoiceRouter(nn.Linear(H, E), K),
    "communication": lambda: ExpertCommunication(Experts(H, INNER, E), H, E),
    "expert list": lambda: ExpertList(nn.Linear(H, H) for _ in range(E)),
    "layer": lambda: MoE(H, INNER, E, K, bias=True),
    "layer of torch's modules": linear_layer,
}
TENSORS = [
    (part, name)
    for part, make in PARTS.items()
    for name, parameter in make().named_parameters()
    if parameter.dim() > 1 or name == "query"
]
every_tensor = pytest.mark.parametrize(("part", "name"), TENSORS)


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return module.get_submodule(path), last


def adapted(module: nn.Module, name: str, *adapters: nn.Module) -> parametrize.ParametrizationList:
    """The module's tensor with adapters in front of it, the innermost first."""
    owner, last = owner_of(module, name)
    for adapter in adapters:
        parametrize.register_parametrization(owner, last, adapter)
    return owner.parametrizations[last]


def reset(module: nn.Module) -> None:
    """First values, written over values that differ from all of them."""
    torch.manual_seed(3)
    module.reset_parameters()


def expected_of(part: str) -> dict[str, Tensor]:
    plain = PARTS[part]()
    reset(plain)
    return plain.state_dict()


def assert_others(module: nn.Module, expected: dict[str, Tensor], name: str) -> None:
    """All but the tensor in question are as without a parametrization."""
    state = module.state_dict()
    for other in expected.keys() - {name}:
        assert torch.equal(state[other], expected[other]), other


@every_tensor
def test_lora_stays_and_what_it_adapts_is_drawn(part: str, name: str) -> None:
    expected = expected_of(part)
    module = PARTS[part]()
    adapter = LoRA(expected[name].shape)
    held = adapted(module, name, adapter)
    learnt = copy.deepcopy(adapter.state_dict())
    kind, original = type(owner_of(module, name)[0]), held.original
    reset(module)
    assert held.original is original
    assert torch.equal(original, expected[name])
    assert_close(adapter.state_dict(), learnt, rtol=0, atol=0)
    assert_others(module, expected, name)
    owner, last = owner_of(module, name)
    assert type(owner) is kind
    assert torch.equal(getattr(owner, last), expected[name] + adapter.a @ adapter.b)


@pytest.mark.parametrize(("part", "name"), [pair for pair in TENSORS if pair[1] != "query"])
def test_weight_norm_starts_as_it_would_on_a_new_module(part: str, name: str) -> None:
    """But for a query, whose first value, 0, is divided by its norm."""
    expected = expected_of(part)
    fresh = PARTS[part]()
    reset(fresh)
    module = PARTS[part]()
    for one in (fresh, module):
        weight_norm(*owner_of(one, name), dim=0)
    reset(module)
    actual = module.state_dict()
    assert actual.keys() == fresh.state_dict().keys()
    for key, tensor in fresh.state_dict().items():
        assert torch.equal(actual[key], tensor), key
    if not name.endswith("out_proj"):  # 0 at first
        owner, last = owner_of(module, name)
        assert_close(getattr(owner, last), expected[name])


def test_a_chain_takes_the_way_of_its_registration() -> None:
    """Inverses from the outermost inwards; LoRA, which has none, passes the values on."""
    expected = expected_of("router")
    module = PARTS["router"]()
    held = adapted(module, "weight", Doubled(), LoRA(expected["weight"].shape), Doubled())
    reset(module)
    assert torch.equal(held.original, expected["weight"] / 4)
    assert_others(module, expected, "weight")


def test_parametrizations_that_only_name_an_inverse() -> None:
    """spectral_norm's is the identity, orthogonal's may refuse: both take the values as they are.

    Neither moves: a reset is no forward pass.
    """
    expected = expected_of("router")
    module = spectral_norm(PARTS["router"](), "weight")
    vectors = {n: b.clone() for n, b in module.named_buffers() if n.endswith(("_u", "_v"))}
    assert vectors
    reset(module)
    assert torch.equal(module.parametrizations.weight.original, expected["weight"])
    for name, buffer in vectors.items():
        assert torch.equal(module.get_buffer(name), buffer)
    assert all(part.training for part in module.modules())

    rotated = orthogonal(PARTS["router"](), "weight", "matrix_exp", use_trivialization=False)
    reset(rotated)
    assert torch.equal(rotated.parametrizations.weight.original, expected["weight"])


def test_two_tensors_of_one_module() -> None:
    expected = expected_of("plain experts")
    module = PARTS["plain experts"]()
    for name in ("down_proj", "up_proj"):
        adapted(module, name, LoRA(expected[name].shape))
    weight_norm(module, "up_proj_bias")
    reset(module)
    assert torch.equal(module.parametrizations.up_proj.original, expected["up_proj"])
    assert torch.equal(module.parametrizations.down_proj.original, expected["down_proj"])
    assert_close(module.up_proj_bias, expected["up_proj_bias"])
    assert torch.equal(module.down_proj_bias, expected["down_proj_bias"])


def test_what_reset_does_not_fill_is_not_touched() -> None:
    class Half(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.ones_(self.bias)

    torch.manual_seed(0)
    half = Half(H, H)
    nn.init.normal_(half.weight)
    weight_norm(half, "weight")
    moe = MoE(H, INNER, E, K, shared_experts=half)
    before = copy.deepcopy(half.state_dict())
    nn.init.zeros_(half.bias)
    moe.reset_parameters()
    assert_close(half.state_dict(), before | {"bias": torch.ones(H)}, rtol=0, atol=0)


def test_pruned_tensors_are_drawn_beneath_their_mask() -> None:
    expected = expected_of("router")
    module = PARTS["router"]()
    prune.random_unstructured(module, "weight", 0.5)
    mask = module.weight_mask.clone()
    reset(module)
    assert torch.equal(module.weight_orig, expected["weight"])
    assert torch.equal(module.weight_mask, mask)
    module(torch.randn(3, H))
    assert torch.equal(module.weight, expected["weight"] * mask)


def test_on_the_meta_device_and_after_it() -> None:
    expected = expected_of("router")
    with torch.device("meta"):
        module = PARTS["router"]()
        adapted(module, "weight", LoRA(torch.Size([E, H])))
        weight_norm(module, "bias")
        module.reset_parameters()
    module.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    reset(module)
    assert torch.equal(module.parametrizations.weight.original, expected["weight"])
    assert_close(module.bias, expected["bias"])


def test_a_failure_leaves_the_module_as_it_was() -> None:
    class Broken(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.zeros_(self.weight)
            raise ValueError("broken")

    broken = Broken.__new__(Broken)
    nn.Module.__init__(broken)
    broken.weight = nn.Parameter(torch.randn(E, H))
    held = adapted(broken, "weight", LoRA(torch.Size([E, H])))
    before, kind = held.original.clone(), type(broken)
    moe = MoE(H, INNER, E, K, shared_experts=broken)
    with pytest.raises(ValueError, match=r"^broken$"):
        moe.reset_parameters()
    assert type(broken) is kind
    assert torch.equal(held.original, before)


def work(rank: int, folder: str) -> None:
    """One process: sharded originals, of one tensor and of two."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    try:
        expected = expected_of("plain experts")
        module = PARTS["plain experts"]()
        torch.manual_seed(5)
        adapter = LoRA(expected["down_proj"].shape)
        learnt = {name: p.detach().clone() for name, p in adapter.named_parameters()}
        held = adapted(module, "down_proj", adapter)
        weight_norm(module, "up_proj")
        fully_shard(module)
        for _ in range(2):  # the second time, process 0 draws what is there
            torch.manual_seed(3 + rank)
            module.reset_parameters()
        assert torch.equal(held.original.full_tensor(), expected["down_proj"])
        for name, parameter in adapter.named_parameters():
            assert torch.equal(parameter.full_tensor(), learnt[name])
        normed = module.parametrizations.up_proj
        assert torch.equal(normed.original1.full_tensor(), expected["up_proj"])
        assert_close(
            normed.original0.full_tensor().flatten(),
            expected["up_proj"].flatten(1).norm(dim=1),
        )
        assert torch.equal(module.up_proj_bias.full_tensor(), expected["up_proj_bias"])
    finally:
        dist.destroy_process_group()


def test_sharded(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=2)
