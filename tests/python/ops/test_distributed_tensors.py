"""A distributed tensor among an op's arguments: the error names it and a way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from torchmoe import ops
from torchmoe.nn import Experts, MoE

T, H, INNER, E, K = 6, 4, 3, 5, 2
IDS = torch.zeros(T, K, dtype=torch.int64)


@pytest.fixture(scope="module")
def spread() -> Iterator[Callable[[torch.Tensor], DTensor]]:
    """Makes a tensor one of a mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    yield lambda tensor: distribute_tensor(tensor, mesh, [Replicate()])
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda spread: ops.router_logits(spread(torch.randn(T, H)), torch.randn(E, H)), "x"),
        (lambda spread: ops.router_logits(torch.randn(T, H), spread(torch.randn(E, H))), "weight"),
        (lambda spread: ops.select_experts(spread(torch.randn(T, E)), K), "scores"),
        (lambda spread: ops.dispatch_plan(spread(IDS), E), "indices"),
        (lambda spread: ops.mean_over_tokens(spread(torch.randn(T, E))), "values"),
        (lambda spread: ops.attach_loss(torch.randn(T, H), spread(torch.ones(()))), "loss"),
        (
            lambda spread: ops.expert_mlp(
                torch.randn(T, H),
                IDS,
                torch.ones(T, K),
                spread(torch.randn(E, INNER, H)),
                None,
                torch.randn(E, H, INNER),
                None,
                "gelu",
            ),
            "w_in",
        ),
        (lambda spread: MoE(H, INNER, E, K)(spread(torch.randn(T, H))), "x"),
    ],
)
def test_is_named(call: Callable[[Any], Any], name: str, spread: Callable[..., DTensor]) -> None:
    message = rf"^\w+: {name} must be a tensor of this process alone, such as {name}\.to_local\(\) "
    with pytest.raises(TypeError, match=message + r"or .*\.full_tensor\(\), got a DTensor$"):
        call(spread)


def test_the_experts_parameters(spread: Callable[..., DTensor]) -> None:
    experts = Experts(H, INNER, E)
    experts.down_proj = torch.nn.Parameter(spread(experts.down_proj.detach()))
    with pytest.raises(TypeError, match=r"^expert_mlp: w_out must be .* got a DTensor$"):
        experts(torch.randn(T, H), IDS, torch.ones(T, K))
    parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in experts.parameters()]
    y = ops.expert_mlp(
        torch.randn(T, H), IDS, torch.ones(T, K), parts[0], None, parts[1], None, "swiglu"
    )
    assert y.shape == (T, H)
