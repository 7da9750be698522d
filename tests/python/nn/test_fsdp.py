"""Parts that `fully_shard` shards compute what whole ones do, inside their forward and outside."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import torchmoe
from torchmoe.nn import (
    CosineRouter,
    ExpertList,
    Experts,
    Gate,
    MoE,
    Router,
    SequenceRouter,
    known_estimators,
)

H, INNER, E, K, T = 6, 8, 5, 2, 11
F64 = torch.float64
RANKS = 2


class Plain(Experts):
    """Custom experts, called with the arguments of experts and nothing else."""

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return 2 * super().forward(x, indices, weights)


class Wrapped(nn.Module):
    """Experts of another library."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Experts(H, INNER, E)
        self.scale = nn.Parameter(torch.full((H,), 3.0))

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return self.scale * self.inner(x, indices, weights)


EXPERTS: dict[str, Callable[[], nn.Module]] = {
    "gated": lambda: Experts(H, INNER, E),
    "plain": lambda: Experts(H, INNER, E, activation="relu", bias=True),
    "list": lambda: ExpertList(
        nn.Sequential(nn.Linear(H, INNER), nn.Tanh(), nn.Linear(INNER, H)) for _ in range(E)
    ),
    "subclass": lambda: Plain(H, INNER, E),
    "wrapped": Wrapped,
}
ROUTERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Router(H, E, bias=True, usage_scaling=True),
    "cosine": lambda: CosineRouter(H, E, usage_scaling=True),
    "sequence": lambda: SequenceRouter(CosineRouter(H, E)),
}
# What is a unit of its own; each of the lists is what one would pass to fully_shard in turn.
UNITS: dict[str, Callable[[MoE], Iterable[nn.Module]]] = {
    "experts": lambda moe: [moe.experts],
    "layer": lambda moe: [moe],
    "experts in layer": lambda moe: [moe.experts, moe],
    "every part": lambda moe: [moe.router, moe.experts, moe],
    "inside the experts": lambda moe: [*moe.experts.children(), moe],
    "inside the router": lambda moe: [*moe.router.children(), moe],
}


def make(experts: str = "gated", router: str = "linear", estimator: str = "exact") -> MoE:
    torch.manual_seed(0)
    gate = Gate(estimator=estimator)
    return MoE(
        H,
        None,
        E,
        K,
        gate=gate,
        router=ROUTERS[router](),
        experts=EXPERTS[experts](),
    ).double()


def tokens(rank: int) -> Tensor:
    return torch.randn(T, H, generator=torch.Generator().manual_seed(rank), dtype=F64)


def step(moe: MoE, x: Tensor, run: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """Output and gradients of a step with weights that no expert's output is blind to."""
    moe.zero_grad()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(1)
    output = (run or moe)(leaf)
    (output[0].square().sum() + output[1]).backward()
    return {"y": output[0].detach(), "x": leaf.grad} | {
        name: parameter.grad.full_tensor()
        if hasattr(parameter.grad, "full_tensor")
        else parameter.grad
        for name, parameter in moe.named_parameters()
    }


def check_step(
    rank: int, units: str, *, checkpointed: bool = False, reshard: bool = True, **options: Any
) -> None:
    """A sharded layer's step, twice, is that of whole ones, whose gradients are averaged."""
    from torch.distributed.fsdp import fully_shard

    whole = [step(make(**options), tokens(r)) for r in range(RANKS)]
    moe = make(**options)
    for unit in UNITS[units](moe):
        fully_shard(unit, reshard_after_forward=reshard)
    sharded = {name for name, p in moe.named_parameters() if hasattr(p, "full_tensor")}
    run = partial(checkpoint, moe, use_reentrant=False) if checkpointed else None
    for _ in range(2):
        actual = step(moe, tokens(rank), run)
        assert actual.keys() == whole[0].keys()
        for name, value in actual.items():
            expected = whole[rank][name]
            if name in sharded:  # FSDP averages over the processes
                expected = (whole[0][name] + whole[1][name]) / 2
            what = f"{units}, {options}, {checkpointed}, {reshard}: {name}"
            assert_close(value, expected, rtol=1e-13, atol=1e-13, msg=lambda m, w=what: f"{w}\n{m}")


def check_readers() -> None:
    """What is read outside of the forward pass."""
    from torch.distributed.fsdp import fully_shard

    x = tokens(0)
    for units in ("every part", "layer"):
        moe = make(router="cosine")
        plain = copy.deepcopy(moe.router)
        for unit in UNITS[units](moe):
            fully_shard(unit)
        router = moe.router
        for name in ("temperature", "directions", "rows"):
            assert torch.equal(getattr(router, name), getattr(plain, name)), name
        for name in ("project", "match_percentages"):
            assert torch.equal(getattr(router, name)(x), getattr(plain, name)(x)), name
        for actual, expected in (
            (torchmoe.geometry(moe), torchmoe.geometry(plain)),
            (torchmoe.geometry(router), torchmoe.geometry(plain)),
        ):
            assert torch.equal(actual.rows, expected.rows)
            assert torch.equal(actual.match_percentages(x), expected.match_percentages(x))
            with torch.no_grad():
                router.projection.zero_()
            assert torch.equal(actual.match_percentages(x), expected.match_percentages(x))
            with torch.no_grad():  # as it was
                local = plain.projection.chunk(RANKS)[dist.get_rank()]
                router.projection.to_local().copy_(local)
        linear = make()
        expected = torchmoe.geometry(copy.deepcopy(linear.router))
        for unit in UNITS[units](linear):
            fully_shard(unit)
        actual = torchmoe.geometry(linear)
        assert torch.equal(actual.rows, expected.rows)
        assert torch.equal(actual.bias, expected.bias)


def check_refusals() -> None:
    """What copies a layer and calls it says that it takes no sharded one."""
    from torch.distributed.fsdp import fully_shard

    moe = make()
    fully_shard(moe)
    sharded = r"must not be sharded, .*, got a DTensor as router\.weight$"
    with pytest.raises(TypeError, match=rf"^gradcheck: module_or_function {sharded}"):
        torchmoe.testing.gradcheck(moe, tokens(0))
    with pytest.raises(TypeError, match=rf"^compare_estimators: moe {sharded}"):
        torchmoe.testing.compare_estimators(moe, [tokens(0)], lambda y, _: y.sum())
    with pytest.raises(TypeError, match=rf"^check_surrogate: layer {sharded}"):
        torchmoe.testing.check_surrogate("exact", router=fully_shard(Router(16, 8)), num_experts=8)


def check_mixed_precision() -> None:
    """FSDP casts what the experts get, scores included, and their gradient comes back."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    x = tokens(0).float()
    whole = step(make(estimator="straight_through_dense").float(), x)
    for cast in (True, False):
        moe = make(estimator="straight_through_dense").float()
        policy = MixedPrecisionPolicy(torch.bfloat16, cast_forward_inputs=cast)
        fully_shard(moe.experts, mp_policy=policy)
        actual = step(moe, x, None if cast else partial(narrow, moe))
        scale = whole["router.weight"].abs().max()
        assert (actual["router.weight"] - whole["router.weight"]).abs().max() < 0.05 * scale


def narrow(moe: MoE, x: Tensor) -> Any:
    """A call with bfloat16 tokens: the router is wider than they are."""
    output = moe(x.bfloat16())
    return output._replace(hidden_states=output.hidden_states.float())


def work(rank: int, folder: str) -> None:
    """One process of the group."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    try:
        dense = {"estimator": "straight_through_dense"}
        for experts in EXPERTS:
            for units in ("experts", "layer", "experts in layer"):
                check_step(rank, units, experts=experts, **dense)
            check_step(rank, "experts", reshard=False, experts=experts, **dense)
        check_step(rank, "inside the experts", experts="wrapped", **dense)
        check_step(rank, "experts in layer", checkpointed=True, **dense)
        check_step(rank, "experts", checkpointed=True, experts="wrapped", **dense)
        for router in ROUTERS:
            check_step(rank, "every part", router=router)
        check_step(rank, "inside the router", router="sequence")
        for estimator in known_estimators():
            check_step(rank, "every part", estimator=estimator)
        check_readers()
        check_refusals()
        check_mixed_precision()
    finally:
        dist.destroy_process_group()


def test_sharded_layers_compute_what_whole_ones_do(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=RANKS)
