"""Processes with unequal numbers of counted tokens: the average of their gradients is the whole's.

The right values come from the formula, written with torch's own operations, on the tokens of all
processes in one batch. In float64, so that only a wrong formula can tell the two apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from balanced import F64, E, H, K, counts_of, make, plain_loss, shares_of
from torchmoe import ops
from torchmoe.nn import Balance, Gate, MoE

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)
RANKS = 4
NUMBERS = {
    "uneven": (5, 21, 8, 13),
    "masked": (16, 16, 16, 16),
    "empty": (9, 0, 4, 7),
    "padding": (9, 6, 4, 7),
    "nothing": (3, 3, 3, 3),
    "first": (5, 21, 8, 13),
    "earlier": (5, 21, 8, 13),
    "checkpointed": (5, 21, 8, 13),
    "compiled": (5, 21, 8, 13),
}
WORLDS = (2, 3, 4)
EQUAL = 7
BALANCE = Balance(weight=1.0, fraction_from="global_batch")


def layer(**options: Any) -> MoE:
    torch.manual_seed(0)
    settings = {"balance": BALANCE, "gate": Gate("sigmoid")}
    return make(**(settings | options))


def tokens_of(case: str, rank: int, micro_batch: int = 0) -> Tensor:
    seed = 100 * micro_batch + 10 * list(NUMBERS).index(case) + rank
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(NUMBERS[case][rank], H, generator=generator, dtype=F64)
    x[:, 0] += rank  # other experts on each rank
    return x


def mask_of(case: str, rank: int) -> Tensor | None:
    number = NUMBERS[case][rank]
    if case == "masked":
        return torch.arange(number) % (rank + 2) == 0
    if case == "padding":
        return torch.full((number,), rank != 1)
    return torch.zeros(number, dtype=torch.bool) if case == "nothing" else None


def seen_of(moe: MoE, run: Callable[..., Any], x: Tensor, **options: Any) -> dict[str, Any]:
    """The loss, its gradient, and how many reductions its forward pass asked for."""
    moe.zero_grad()
    reductions = []
    all_reduce = dist.all_reduce

    def counted(*given: Any, **named: Any) -> Any:
        reductions.append(given)
        return all_reduce(*given, **named)

    dist.all_reduce = counted
    try:
        loss = run(x, **options).aux_loss
    finally:
        dist.all_reduce = all_reduce
    loss.backward()
    return {
        "loss": loss.detach(),
        "gradient": moe.router.weight.grad.clone(),
        "reductions": len(reductions),
    }


def seen_with_equal_numbers(group: dist.ProcessGroup, rank: int) -> dict[str, Tensor]:
    """The loss of the layer and that of the op with the fractions of all, in float32."""
    moe = layer(process_group=group, dtype=torch.float32)
    x = torch.randn(EQUAL, H, generator=torch.Generator().manual_seed(rank))
    output = moe(x)
    counts = output.routing.tokens_per_expert.clone()
    dist.all_reduce(counts, group=group)
    logits = output.routing.logits
    plain = ops.load_balancing_loss(logits, counts.float() / counts.sum(), score_function="sigmoid")
    (got,) = torch.autograd.grad(output.aux_loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(plain, logits)
    losses = {"loss": output.aux_loss.detach(), "expected_loss": plain.detach()}
    return losses | {"gradient": got, "expected_gradient": expected}


def work(rank: int, folder: str) -> None:
    """One process; what it saw in groups of several sizes is for the tests to judge."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    try:
        groups = {world: dist.new_group(list(range(world))) for world in WORLDS}
        seen: dict[Any, Any] = {}
        for world, group in groups.items():
            if rank >= world:
                continue
            moe = layer(process_group=group)
            first = layer(process_group=group, balance=replace(BALANCE, fraction_choices="first"))
            seen["equal", world] = seen_with_equal_numbers(group, rank)
            for case in NUMBERS:
                x, run, options = tokens_of(case, rank), moe, {"token_mask": mask_of(case, rank)}
                some: Callable[..., Any] = moe
                if case == "first":
                    run = some = first
                elif case == "earlier":
                    earlier = moe(tokens_of(case, rank, 1)).routing.tokens_per_expert
                    options["earlier_counts"] = earlier
                elif case == "checkpointed":
                    some = lambda x, moe=moe, **given: checkpoint(  # noqa: E731
                        moe, x, use_reentrant=False, **given
                    )
                elif case == "compiled":
                    some = torch.compile(moe, fullgraph=True, dynamic=True, backend="aot_eager")
                seen[case, world] = seen_of(run, some, x, **options)
        # None names all processes.
        moe = layer()
        seen["uneven", None] = seen_of(moe, moe, tokens_of("uneven", rank))
        moe.eval()
        seen["evaluation"] = seen_of(moe, moe, tokens_of("uneven", rank))
        torch.save(seen, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of the processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def whole(case: str, world: int, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of the counted tokens of all in one batch, its gradient, and a bound on the error.

    A number of the gradient is a sum over n tokens, each term at most E max(f) / n |x|, which is
    formed by sums over H features and E experts.
    """
    counts, batches = torch.zeros(E, dtype=F64), []
    for rank in range(world):
        for micro_batch in (0, 1) if case == "earlier" else (0,):
            x, mask = tokens_of(case, rank, micro_batch), mask_of(case, rank)
            x = x if mask is None else x[mask]
            chosen = (x @ weight.t()).topk(K).indices
            counts += counts_of(chosen[:, : 1 if case == "first" else K])
            if micro_batch == 0:
                batches.append(x)
    x = torch.cat(batches)
    if len(x) == 0:
        return torch.zeros((), dtype=F64), torch.zeros_like(weight), torch.zeros(H, dtype=F64)
    weight = weight.detach().clone().requires_grad_()
    fraction = counts / counts.sum()
    loss = plain_loss(fraction, shares_of(x @ weight.t(), "sigmoid"))
    (gradient,) = torch.autograd.grad(loss, [weight])
    rounding = (len(x) + H + E) * torch.finfo(F64).eps
    return loss.detach(), gradient, 4 * rounding * E * fraction.max() * x.abs().mean(0)


def average(seen: list[dict[str, Any]], name: str) -> Tensor:
    return sum(one[name] for one in seen) / len(seen)


def assert_is_the_whole(seen: list[dict[str, Any]], case: str) -> None:
    loss, gradient, bound = whole(case, len(seen), layer().router.weight.detach())
    assert ((average(seen, "gradient") - gradient).abs() <= bound).all()
    assert abs(average(seen, "loss") - loss) <= 4 * E * (H + E) * torch.finfo(F64).eps
    assert all(one["reductions"] == 1 for one in seen)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", NUMBERS)
def test_the_average_is_the_whole(ranks: list[dict[Any, Any]], case: str, world: int) -> None:
    assert_is_the_whole([ranks[rank][case, world] for rank in range(world)], case)


def test_without_a_group_all_processes_count(ranks: list[dict[Any, Any]]) -> None:
    assert_is_the_whole([seen["uneven", None] for seen in ranks], "uneven")


def test_a_plain_average_of_means_would_be_another(ranks: list[dict[Any, Any]]) -> None:
    """What unequal numbers change is far above the bound, so that the tests can fail."""
    weight = layer().router.weight.detach()
    _, gradient, bound = whole("uneven", RANKS, weight)
    shares = [ranks[rank]["uneven", RANKS]["gradient"] for rank in range(RANKS)]
    numbers = NUMBERS["uneven"]
    unscaled = [
        share * sum(numbers) / (number * RANKS)
        for share, number in zip(shares, numbers, strict=True)
    ]
    assert ((sum(unscaled) / RANKS - gradient).abs() > 1e6 * bound).any()


@pytest.mark.parametrize("case", ["empty", "padding"])
def test_a_process_without_a_token_gives_nothing(ranks: list[dict[Any, Any]], case: str) -> None:
    for world in WORLDS:
        seen = ranks[1][case, world]
        assert seen["loss"] == 0
        assert (seen["gradient"] == 0).all()


@pytest.mark.parametrize("world", WORLDS)
def test_equal_numbers_change_no_bit(ranks: list[dict[Any, Any]], world: int) -> None:
    for rank in range(world):
        seen = ranks[rank]["equal", world]
        assert torch.equal(seen["loss"], seen["expected_loss"])
        assert torch.equal(seen["gradient"], seen["expected_gradient"])


def test_evaluation_asks_nobody(ranks: list[dict[Any, Any]]) -> None:
    for rank, seen in enumerate(ranks):
        moe = layer(balance=replace(BALANCE, fraction_from="batch")).eval()
        expected = moe(tokens_of("uneven", rank)).aux_loss.detach()
        assert torch.equal(seen["evaluation"]["loss"], expected)
        assert seen["evaluation"]["reductions"] == 0
