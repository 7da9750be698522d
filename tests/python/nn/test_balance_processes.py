"""Fractions of the global batch, over processes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from balanced import (
    F64,
    RING,
    E,
    H,
    K,
    T,
    balance,
    counts_of,
    gradient_of,
    make,
    plain_loss,
    shares_of,
)
from torchmoe import update_selection_bias
from torchmoe.nn import Assistance, Balance, Gate, MoE, Routing

# --- several processes --------------------------------------------------------------------------

RANKS = 2
BALANCE = Balance(weight=1.0, fraction_from="global_batch", selection_bias_rate=0.125)


def of_ranks(**options: Any) -> MoE:
    torch.manual_seed(0)
    return make(
        **(
            {
                "balance": BALANCE,
                "gate": Gate("sigmoid"),
                "assistance": Assistance(RING, threshold=1.0, lower_threshold=0.5, patience=1),
            }
            | options
        )
    )


def rank_tokens(rank: int, micro_batch: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10 * micro_batch + rank)
    x = torch.randn(T, H, generator=generator, dtype=F64)
    x[:, 0] += 3 * rank  # other experts on either rank
    return x


def seen_of(moe: MoE, run: Callable[..., Any], *args: Any, **options: Any) -> dict[str, Tensor]:
    """The balancing loss and its gradient."""
    moe.zero_grad()
    _, aux_loss, routing = run(*args, **options)
    aux_loss.backward()
    return {
        "loss": Routing(*routing).losses["load_balancing_loss"].detach(),
        "gradient": moe.router.weight.grad.clone(),
    }


def work(rank: int, folder: str) -> None:
    """One process of the group; what it saw is for the test to judge."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    try:
        x = rank_tokens(rank)
        some = torch.arange(T) % 3 != rank
        # Rank 1 has nothing but padding.
        all_or_none = torch.full((T,), rank == 0)
        groups = [dist.new_group([r]) for r in range(RANKS)]
        seen = {}
        moe = of_ranks()
        seen["plain"] = seen_of(moe, moe, x)
        first = of_ranks(balance=replace(BALANCE, fraction_choices="first"))
        seen["first"] = seen_of(first, first, x)
        seen["masked"] = seen_of(moe, moe, x, token_mask=some)
        seen["empty"] = seen_of(moe, moe, x, token_mask=all_or_none)
        for use_reentrant in (True, False):
            leaf = x.clone().requires_grad_()
            seen[f"checkpointed_{use_reentrant}"] = seen_of(
                moe,
                lambda x, use_reentrant=use_reentrant: checkpoint(
                    moe, x, use_reentrant=use_reentrant
                ),
                leaf,
            )
        earlier = moe(rank_tokens(rank, 1)).routing.tokens_per_expert
        seen["earlier"] = seen_of(moe, moe, x, earlier_counts=earlier)
        compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend="aot_eager")
        seen["compiled"] = seen_of(moe, compiled, x)

        moe.eval()
        if rank == 0:  # where the other process does not evaluate
            moe(rank_tokens(1))
        seen["evaluation"] = seen_of(moe, moe, x)
        moe.train()

        alone = of_ranks(process_group=groups[rank])
        seen["alone"] = seen_of(alone, alone, x)
        copied = copy.deepcopy(alone)
        seen["copy"] = seen_of(copied, copied, x)
        alone.update(alone(x).routing)
        seen["alone_state"] = dict(alone.state_dict())
        named = of_ranks()
        named.update(named(x).routing, group=groups[rank])
        seen["named_state"] = dict(named.state_dict())
        moe.update([moe(x).routing, moe(rank_tokens(rank, 1)).routing])
        seen["state"] = dict(moe.state_dict())
        torch.save(seen, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What either of two processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def fractions_and_shares(
    moe: MoE,
    masks: Sequence[Tensor | None] = (None, None),
    columns: int = K,
    micro_batches: int = 1,
) -> tuple[Tensor, list[Tensor]]:
    """The share of all ranks' slots, and each rank's scores in its first micro-batch."""
    counts, shares = torch.zeros(E, dtype=F64), []
    for rank, mask in enumerate(masks):
        for micro_batch in range(micro_batches):
            logits = rank_tokens(rank, micro_batch) @ moe.router.weight.t()
            logits = logits if mask is None else logits[mask]
            counts = counts + counts_of(logits.topk(K).indices[:, :columns])
            if micro_batch == 0:
                shares.append(shares_of(logits, "sigmoid"))
    return counts / counts.sum(), shares


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", {}),
        ("checkpointed_True", {}),
        ("checkpointed_False", {}),
        ("compiled", {}),
        ("first", {"columns": 1}),
        ("masked", {"masks": [torch.arange(T) % 3 != rank for rank in range(RANKS)]}),
        ("earlier", {"micro_batches": 2}),
    ],
)
def test_from_the_global_batch(
    ranks: list[dict[str, Any]], name: str, options: dict[str, Any]
) -> None:
    """The fractions of all processes, and each one's own mean scores."""
    moe = of_ranks()
    fraction, shares = fractions_and_shares(moe, **options)
    for rank in range(RANKS):
        expected = plain_loss(fraction, shares[rank])
        assert_close(ranks[rank][name]["loss"], expected.detach())
        assert_close(ranks[rank][name]["gradient"], gradient_of(expected, moe))
        ids = shares[rank].topk(K).indices
        local = plain_loss(counts_of(ids) / ids.numel(), shares[rank])
        assert not torch.allclose(expected, local, rtol=1e-3)


def test_a_process_with_padding_only(ranks: list[dict[str, Any]]) -> None:
    moe = of_ranks()
    fraction, shares = fractions_and_shares(
        moe, masks=[torch.ones(T, dtype=torch.bool), torch.zeros(T, dtype=torch.bool)]
    )
    # The mean over both processes is the loss of the one that has tokens.
    assert_close(ranks[0]["empty"]["loss"], RANKS * plain_loss(fraction, shares[0]).detach())
    assert ranks[1]["empty"]["loss"] == 0
    assert (ranks[1]["empty"]["gradient"] == 0).all()


def test_averaged_over_processes_it_is_the_loss_of_the_whole(ranks: list[dict[str, Any]]) -> None:
    whole = of_ranks(balance=replace(BALANCE, fraction_from="batch"))
    output = whole(torch.cat([rank_tokens(rank) for rank in range(RANKS)]))
    mean = sum(seen["plain"]["loss"] for seen in ranks) / RANKS
    assert_close(mean, balance(output.routing).detach())
    gradient = sum(seen["plain"]["gradient"] for seen in ranks) / RANKS
    assert_close(gradient, gradient_of(output.aux_loss, whole))


def test_a_process_group_of_one(ranks: list[dict[str, Any]]) -> None:
    for rank, seen in enumerate(ranks):
        moe = of_ranks(balance=replace(BALANCE, fraction_from="batch"))
        output = moe(rank_tokens(rank))
        assert_close(seen["alone"]["loss"], balance(output.routing).detach())
        moe.update(output.routing)
        for name, value in moe.state_dict().items():
            assert torch.equal(seen["alone_state"][name], value), name
            assert torch.equal(seen["named_state"][name], value), name
    assert not torch.equal(
        ranks[0]["alone_state"]["selection_bias"], ranks[1]["alone_state"]["selection_bias"]
    )


def test_in_evaluation_no_process_waits_for_another(ranks: list[dict[str, Any]]) -> None:
    """What each of them evaluates is its own affair, and so is its batch."""
    for rank, seen in enumerate(ranks):
        moe = of_ranks(balance=replace(BALANCE, fraction_from="batch")).eval()
        expected = balance(moe(rank_tokens(rank)).routing)
        assert_close(seen["evaluation"]["loss"], expected.detach())
        assert_close(seen["evaluation"]["gradient"], gradient_of(expected, moe))


def test_all_processes_move_alike(ranks: list[dict[str, Any]]) -> None:
    moe = of_ranks(balance=replace(BALANCE, fraction_from="batch"))
    parts = [moe(rank_tokens(rank, part)).routing for rank in range(RANKS) for part in range(2)]
    moe.update(parts)
    assert moe.assistance.assisted.any()
    counts = sum(routing.tokens_per_expert for routing in parts)
    expected = update_selection_bias(torch.zeros(E, dtype=F64), counts, 0.125)
    assert torch.equal(moe.selection_bias, expected)
    for seen in ranks:
        for name, value in moe.state_dict().items():
            assert torch.equal(seen["state"][name], value), name


def test_a_copy_has_the_same_process_group(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert_close(seen["copy"], seen["alone"], rtol=0, atol=0)
