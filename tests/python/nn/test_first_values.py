"""Sharded parameters start with the bits of one process, whatever the sharding and the seeds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchmoe.nn import (
    Balance,
    CosineRouter,
    ExpertChoiceRouter,
    ExpertCommunication,
    ExpertList,
    Experts,
    Gate,
    MoE,
    Router,
    SequenceRouter,
)

# 2, 3 and 4 divide H and the inner width, none of them E.
H, INNER, E, K = 12, 24, 5, 2
SEED = 3


class Scaled(nn.Module):
    """Draws what its own children hold, as modules that reset all of theirs at once do."""

    def __init__(self, device: str | None) -> None:
        super().__init__()
        self.inner = nn.Linear(H, H, device=device)
        self.fixed = nn.Parameter(torch.zeros(E, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.inner.weight, std=3.0)
        self.inner.bias.data.fill_(0.5)
        nn.init.ones_(self.fixed)


def mlp(device: str | None) -> nn.Module:
    return nn.Sequential(nn.Linear(H, INNER, device=device), nn.Linear(INNER, H, device=device))


def layer(device: str | None) -> MoE:
    return MoE(
        H,
        INNER,
        E,
        K,
        bias=True,
        gate=Gate(estimator="default_vector"),
        router=CosineRouter(H, E, projection_size=H, track_usage=True, device=device),
        balance=Balance(selection_bias_rate=0.01),
        shared_experts=mlp(device),
        device=device,
    )


PARTS: dict[str, Callable[[str | None], nn.Module]] = {
    "gated experts": lambda device: Experts(H, INNER, E, device=device),
    "plain experts": lambda device: Experts(
        H, INNER, E, activation="relu", bias=True, device=device
    ),
    "half experts": lambda device: Experts(H, INNER, E, device=device, dtype=torch.bfloat16),
    "router": lambda device: Router(H, E, bias=True, track_usage=True, device=device),
    "cosine router": lambda device: CosineRouter(
        H, E, projection_size=H, track_usage=True, device=device
    ),
    "sequence router": lambda device: SequenceRouter(Router(H, E, device=device)),
    "expert choice router": lambda device: ExpertChoiceRouter(nn.Linear(H, E, device=device), K),
    "communication": lambda device: ExpertCommunication(
        Experts(H, INNER, E, device=device), H, E, size=H, device=device
    ),
    "expert list": lambda device: ExpertList(
        [mlp(device), Scaled(device), *(mlp(device) for _ in range(E - 2))]
    ),
    "layer": layer,
}


def filled(module: nn.Module) -> nn.Module:
    """The module with nothing but NaN in it: what reset_parameters forgets is seen."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            local.fill_(torch.nan if tensor.is_floating_point() else -1)
    return module


def whole(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in module.state_dict().items()
    }


def assert_same(module: nn.Module, expected: dict[str, Tensor], what: str) -> None:
    actual = whole(module)
    assert actual.keys() == expected.keys(), what
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), f"{what}: {name}"


def on_second_dimension(parameter: nn.Parameter) -> Any:
    from torch.distributed.tensor import Shard

    return Shard(1 if parameter.dim() > 1 else 0)


def check(part: str, mesh: Any, place: Callable[..., Any] | None, seed: int) -> None:
    """Asserts that a part sharded over the mesh gets the values of one process with SEED."""
    from torch.distributed.fsdp import fully_shard

    what = f"{part} on {mesh.shape}, {place}, seed {seed}"
    one = filled(PARTS[part](None))
    torch.manual_seed(SEED)
    one.reset_parameters()
    generator = torch.get_rng_state()
    module = PARTS[part]("meta")
    # The experts of a layer are a unit of their own, as in a model.
    for unit in [module.experts, module] if isinstance(module, MoE) else [module]:
        fully_shard(unit, mesh=mesh, shard_placement_fn=place)
    module.reset_parameters()  # on the meta device: nothing
    filled(module.to_empty(device="cpu"))
    held = dict(module.named_parameters())
    torch.manual_seed(seed)
    module.reset_parameters()
    assert_same(module, whole(one), what)
    if seed == SEED:
        assert torch.equal(torch.get_rng_state(), generator), what
    for name, parameter in module.named_parameters():
        assert parameter is held[name], f"{what}: {name}"


def check_what_is_left_alone(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    module = Scaled(None)
    module.register_parameter("other", nn.Parameter(torch.arange(float(E))))
    experts = fully_shard(ExpertList([module]), mesh=mesh)
    experts.reset_parameters()
    assert torch.equal(module.other.full_tensor(), torch.arange(float(E)))
    assert torch.equal(module.fixed.full_tensor(), torch.ones(E))


def work(rank: int, folder: str) -> None:
    """One of four processes; some of them are 2 and 3 processes, and 2 times 2."""
    from torch.distributed.device_mesh import DeviceMesh

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4
    )
    try:
        names = ("replicate", "shard")
        meshes = [DeviceMesh("cpu", list(range(size))) for size in (4, 3, 2)]
        meshes.append(DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=names))
        for mesh in meshes:
            if mesh.get_coordinate() is None:
                continue
            for part in PARTS:
                check(part, mesh, None, SEED)
                if mesh.size() == 4:
                    check(part, mesh, None, SEED + rank)
                else:
                    check(part, mesh, on_second_dimension, SEED)
            check_what_is_left_alone(mesh)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_sharded_parts_start_with_the_bits_of_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=4)


@pytest.mark.parametrize("part", PARTS)
def test_first_values_are_those_of_plain_draws(part: str) -> None:
    """The generator gives each parameter what it gives nn.init on the tensor itself, in order."""
    module = PARTS[part](None)
    expected = PARTS[part](None)
    torch.manual_seed(SEED)
    filled(module).reset_parameters()
    torch.manual_seed(SEED)
    draw(expected)
    assert_same(module, expected.state_dict(), part)


@torch.no_grad()
def draw(module: nn.Module) -> None:
    """First values written down once more, without the modules' own reset_parameters."""
    match module:
        case MoE():
            draw(module.router)
            draw(module.experts)
            draw(module.shared_experts)
        case Experts():
            name = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
            for start, fan_in in ((name, H), ("down_proj", INNER)):
                for tensor in (getattr(module, start), getattr(module, f"{start}_bias")):
                    if tensor is not None:
                        tensor.uniform_(-(fan_in**-0.5), fan_in**-0.5)
        case Router():
            for tensor in (module.weight, module.bias):
                if tensor is not None:
                    tensor.uniform_(-(H**-0.5), H**-0.5)
        case CosineRouter():
            module.projection.uniform_(-(H**-0.5), H**-0.5)
            module.embeddings.normal_()
        case ExpertCommunication():
            module.qkv_proj.uniform_(-(H**-0.5), H**-0.5)
            draw(module.experts)
        case SequenceRouter() | ExpertChoiceRouter():
            draw(module.router)
        case ExpertList():
            for expert in module.experts:
                draw(expert)
        case Scaled():
            module.inner.weight.normal_(0.0, 3.0)
            module.inner.bias.fill_(0.5)
            module.fixed.fill_(1.0)
            draw(module.inner)  # which has a reset_parameters of its own
        case nn.Sequential():
            for child in module:
                draw(child)
        case nn.Linear():
            for tensor in (module.weight, module.bias):
                bound = module.in_features**-0.5
                tensor.uniform_(-bound, bound)


def test_dtensor_is_not_loaded_for_it() -> None:
    program = (
        "import sys, torchmoe\n"
        "torchmoe.nn.MoE(4, 4, 2, 1).reset_parameters()\n"
        "assert 'torch.distributed.tensor' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
