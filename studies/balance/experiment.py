"""One layer with each way of balancing, from a collapsed start."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import torchmoe
from torchmoe.nn import Balance, Capacity, MoE, Router
from training.figures import Values
from training.settings import Settings, SettingsError

HIDDEN_SIZE, INTERMEDIATE_SIZE, EXPERTS, TOP_K = 32, 16, 8, 2
SEQUENCES, LENGTH = 16, 32  # of a batch
CLUSTERS, CLUSTERS_PER_SEQUENCE = 16, 4
# Of the target's variance. As in a language model, most of the loss is not at stake where a router
# chooses: otherwise its gradient would be so large that no usual coefficient could matter.
OWN_SHARE = 0.1
# By how much the logits of the first two experts are above the others. It must be more than any
# token's own preferences (the difference of two logits has a standard deviation of 1.1), and still
# let the other experts' probabilities be felt: 0.1 % each.
COLLAPSE = 6.0
LR = Settings().lr
STEPS_PER_RECORD = 40
BOUND = 1.0  # of MaxVio
END_SHARE = 0.1  # of the steps: where recovery shows and final numbers are taken
CONTROL, HEALTHY = "control", "never_collapsed"


@dataclass(frozen=True)
class Method:
    """What is different from one method to the next."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of the layer, whose balance is Balance(0) else."""
    starts_collapsed: bool = True


METHODS = {
    CONTROL: Method(),
    HEALTHY: Method(starts_collapsed=False),
    "load_balancing:batch": Method({"balance": Balance(0.01)}),
    "load_balancing:sequence": Method({"balance": Balance(0.01, fraction_from="sequence")}),
    "load_balancing:history": Method({"balance": Balance(0.01, fraction_from="history")}),
    "importance+load": Method(
        {"balance": Balance(0, losses=[("importance_loss", 0.1), ("load_loss", 0.1)])}
    ),
    "mutual_information": Method(
        {"balance": Balance(0, losses=[("mutual_information_loss", 0.01)])}
    ),
    "global_entropy": Method({"balance": Balance(0, losses=[("global_entropy_loss", 0.01)])}),
    "selection_bias": Method({"balance": Balance(0, selection_bias_rate=0.001)}),
    "next_best": Method({"capacity": Capacity(1, overflow="next_best")}),
}


@dataclass(frozen=True)
class Run:
    """One seed of one method; N records, each the mean of some steps."""

    steps: Values
    """[N], optimizer steps at the end of each record."""
    violation: Values
    """[N], MaxVio."""
    dead: Values
    """[N], experts without a token."""
    rerouted: Values
    """[N], share of the slots that went to another expert than the router's choice."""
    loss: Values
    """[N], see above."""

    def at_end(self, values: Values) -> float:
        """The mean over the end of the run."""
        return float(values[self.steps > (1 - END_SHARE) * self.steps[-1]].mean())

    def recovery(self, control: Run) -> int | None:
        """The step after which it had recovered, None if it did not."""
        above = np.flatnonzero(self.violation >= BOUND)
        last_above = self.steps[above[-1]] if len(above) else 0
        if last_above > (1 - END_SHARE) * self.steps[-1]:
            return None
        better = self.at_end(self.loss) < control.at_end(control.loss)
        return int(last_above) if better else None


class Task:
    """Tokens and targets; an endless stream of batches that depends on the seed alone."""

    def __init__(self, seed: int) -> None:
        """Draws where the clusters are and what is to be learned."""
        self.generator = torch.Generator().manual_seed(seed)
        features = HIDDEN_SIZE - 1
        self.centres = self.normal(CLUSTERS, features)
        # Both parts of a target have variance 1, and so has the target.
        self.common = self.normal(features, HIDDEN_SIZE) / math.sqrt(2 * features)
        self.own = self.normal(CLUSTERS, features, HIDDEN_SIZE) / math.sqrt(features)

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers of variance 1."""
        return torch.randn(shape, generator=self.generator)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Tokens and targets, each [B, S, HIDDEN_SIZE]; B sequences of S tokens.

        A sequence is about a few clusters only, as a text is about few things: what is even over
        the batch is not even in each sequence.
        """
        order = torch.rand(SEQUENCES, CLUSTERS, generator=self.generator)
        about = order.topk(CLUSTERS_PER_SEQUENCE, dim=1).indices  # [B, few]
        shape = SEQUENCES, LENGTH
        which = torch.randint(CLUSTERS_PER_SEQUENCE, shape, generator=self.generator)
        cluster = about.gather(1, which)  # [B, S]
        offset = self.normal(*shape, 1, HIDDEN_SIZE - 1)  # from the cluster's centre
        own = (offset @ self.own[cluster]).squeeze(2)  # [B, S, H]
        place = self.centres[cluster] + offset.squeeze(2)  # [B, S, H - 1]
        target = math.sqrt(1 - OWN_SHARE) * place @ self.common + math.sqrt(OWN_SHARE) * own
        # The first feature is constant: the experts' bias, and the handle for the collapse.
        return torch.cat([torch.ones(*shape, 1), place], dim=-1), target


def make_layer(method: Method, seed: int) -> MoE:
    """The layer, in which TOP_K experts are far above the others for every token, or none is."""
    torch.manual_seed(seed)
    moe = MoE(
        HIDDEN_SIZE,
        INTERMEDIATE_SIZE,
        EXPERTS,
        TOP_K,
        # It learns the common function, so that the experts have the clusters' own to learn.
        shared_experts=nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE, bias=False),
        **{"balance": Balance(0), **method.arguments},
    )
    # The weights of the constant feature add the same to the logits of every token. They are the
    # router's own parameter, so that whatever teaches the router can undo it.
    assert isinstance(moe.router, Router)
    with torch.no_grad():
        offset = moe.router.weight[:, 0].zero_()  # [E]
        if method.starts_collapsed:
            offset[:TOP_K] = COLLAPSE
    return moe


def train(name: str, seed: int, steps: int, lr: float, advance: Callable[[], None]) -> Run:
    """Trains one layer and follows it; `advance` is called after every step.

    Raises:
        SettingsError: the loss is not finite.
    """
    task = Task(seed)
    moe = make_layer(METHODS[name], seed)
    optimizer = torch.optim.Adam(moe.parameters(), lr=lr)
    rows, losses = [], []
    with torchmoe.watch(moe) as watcher:
        for step in range(1, steps + 1):
            tokens, target = task.batch()
            output = moe(tokens)
            loss = (output.hidden_states - target).square().mean()
            (loss + output.aux_loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            moe.update(output.routing)
            losses.append(loss.item() / OWN_SHARE)
            advance()
            if step % STEPS_PER_RECORD == 0 or step == steps:
                if not math.isfinite(sum(losses)):
                    raise SettingsError(
                        f"--lr must be lower, got {lr:g}: the loss of {name} is no longer finite "
                        f"after {step} steps"
                    )
                (routing,) = watcher.collect().values()  # means since the last record
                numbers = routing.max_violation, routing.dead_experts, routing.rerouted_share
                rows.append([step, *(value.item() for value in numbers), fmean(losses)])
                losses = []
    return Run(*np.array(rows, dtype=np.float64).T)


def describe(name: str, seed: int, run: Run) -> str:
    """What a run ends with."""
    return (
        f"{name:23s}  seed {seed}  MaxVio {run.at_end(run.violation):.2f}  "
        f"task loss {run.at_end(run.loss):.2f}"
    )
