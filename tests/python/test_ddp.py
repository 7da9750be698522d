"""DistributedDataParallel over ranks whose tokens go to disjoint experts equals one process."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from torchmoe import RoutingReplay
from torchmoe.nn import Balance, Estimator, ExpertList, Gate, MoE, MoEOutput, Router

RANKS, H, INNER, E, K, T, STEPS = 2, 7, 8, 6, 2, 10, 3


class Sums(Estimator):
    """Keeps the sum of all outputs, to see that statistics are summed over the ranks."""

    def bind(self, *, device: object = None, dtype: object = None, **layer: object) -> None:
        super().bind(**layer, device=device, dtype=dtype)
        self.register_buffer("total", torch.zeros(self.hidden_size, device=device, dtype=dtype))

    def combine(self, x: Tensor, *rest: object, **options: object) -> tuple[Tensor, Tensor]:
        y = super().combine(x, *rest, **options)
        return y, y.sum(0)

    def update(self, statistics: Tensor) -> None:
        self.total += statistics


def make(kind: str) -> MoE:
    torch.manual_seed(0)
    experts = None
    if kind == "listed":
        experts = ExpertList(
            nn.Sequential(nn.Linear(H, INNER), nn.Tanh(), nn.Linear(INNER, H)) for _ in range(E)
        )
    moe = MoE(
        H,
        INNER,
        E,
        K,
        # The mean over ranks of a product of means is not that of all tokens: no balancing loss.
        balance=Balance(weight=0.0),
        gate=Gate(estimator=Sums()),
        router=Router(H, E, usage_scaling=True),
        experts=experts,
    ).double()
    with torch.no_grad():
        # The first coordinate decides: positive to experts 0, 1 and 2, negative to 3, 4 and 5.
        moe.router.weight[:3, 0] = 50.0
        moe.router.weight[3:, 0] = -50.0
    return moe


def tokens(rank: int, step: int) -> Tensor:
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(10 * step + rank)).double()
    x[:, 0] = (x[:, 0].abs() + 1) * (1 if rank == 0 else -1)
    return x


def train(moe: MoE, model: nn.Module, batches: list[Tensor]) -> list[MoEOutput]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = []
    for x in batches:
        optimizer.zero_grad()
        output = model(x)
        (output.hidden_states.square().mean() + output.aux_loss).backward()
        optimizer.step()
        moe.update(output.routing)
        outputs.append(output)
    return outputs


def work(rank: int, kind: str, folder: str) -> None:
    """One process of the group; saves its layer for the test to compare."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    try:
        moe = make(kind)
        model = DistributedDataParallel(moe)
        outputs = train(moe, model, [tokens(rank, step) for step in range(STEPS)])
        # A layer has the name that it has without.
        for wrapped, name in ((model, "moe"), (nn.Sequential(model), "0")):
            replay = RoutingReplay(wrapped)
            with replay.record():
                wrapped(tokens(rank, 0))
            assert list(replay.decisions) == [name]
        mine, others = ([0, 1, 2], [3, 4, 5]) if rank == 0 else ([3, 4, 5], [0, 1, 2])
        for output in outputs:
            counts = output.routing.tokens_per_expert
            assert counts[mine].sum() == K * T
            assert counts[others].sum() == 0
        # A group of one process: the counts of the other rank stay out.
        groups = [dist.new_group([r]) for r in range(RANKS)]
        alone = copy.deepcopy(moe)
        alone.router.usage_decay = 0.0
        alone.update(outputs[-1].routing, group=groups[rank])
        assert_close(alone.router.usage, outputs[-1].routing.tokens_per_expert.double() / (K * T))
        torch.save(moe.state_dict(), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["stacked", "listed"])
def test_equals_one_process(kind: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, args=(kind, str(tmp_path)), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    assert_close(ranks[0], ranks[1], rtol=0, atol=0)

    moe = make(kind)
    start = make(kind).state_dict()
    batches = [torch.cat([tokens(rank, step) for rank in range(RANKS)]) for step in range(STEPS)]
    train(moe, moe, batches)
    assert_close(ranks[0], moe.state_dict())
    for name, value in moe.state_dict().items():
        assert not torch.equal(value, start[name]), name
