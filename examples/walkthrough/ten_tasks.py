"""Step 9: ten tasks in a row for one favourite, until its backup joins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchmoe import ops
from torchmoe.nn import Routing
from walkthrough.made_up import (
    BACKUP,
    BALANCE_WEIGHT,
    EXPERTS,
    LEARNING_RATE,
    PATIENCE,
    POETRY,
    SCIENCE,
    TASKS,
    THRESHOLD,
    USAGE_DECAY,
    make_layer,
    make_router,
    probabilities,
    usage_of,
)
from walkthrough.printing import heading, table

# ---- computed


@dataclass(frozen=True)
class Task:
    """One of the tasks in a row, as it is when the sentence comes."""

    usage: Tensor
    """[E], each expert's share of the slots so far."""
    probabilities: Tensor
    """[E]."""
    served_by: list[int]
    """The experts at work, the backup last where it has joined."""
    weight: float
    """The favourite's in the output."""
    loss: float
    """N sum f P, with f = usage."""
    part: float
    """The favourite's term of that sum."""
    weighted: float
    """Lambda times the loss: what the gate is trained by."""


@dataclass(frozen=True)
class Row:
    """Tasks in a row, and what is left of them."""

    tasks: list[Task]
    usage: Tensor
    """[E], after the last task."""
    logits: Tensor
    """[E], after the last task."""


def repeat(gate_input: Tensor) -> Row:
    """The same sentence again and again, after each the gate takes a step down the loss."""
    router = make_router(usage_scaling=True)
    router.usage_decay = USAGE_DECAY
    layer = make_layer(router, balance_weight=BALANCE_WEIGHT, assisted=True)
    optimizer = torch.optim.SGD(router.parameters(), lr=LEARNING_RATE)
    x = gate_input.unsqueeze(0)
    tasks = []
    for _ in range(TASKS):
        output = layer(x)
        tasks.append(look_at(output.routing, usage_of(router), output.aux_loss.item()))
        optimizer.zero_grad()
        output.aux_loss.backward()
        optimizer.step()
        layer.update(output.routing)
    with torch.no_grad():
        return Row(tasks, usage_of(router), router(x)[0])


@torch.no_grad()
def look_at(routing: Routing, usage: Tensor, weighted: float) -> Task:
    """What one task shows."""
    of_favourite = torch.zeros_like(usage)
    of_favourite[POETRY] = usage[POETRY]
    part = ops.load_balancing_loss(routing.logits, of_favourite, score_function="softmax")
    served_by = routing.indices[0].tolist()
    return Task(
        usage,
        probabilities(routing.logits)[0],
        [expert for expert in served_by if expert >= 0],
        routing.weights[0, served_by.index(POETRY)].item(),
        routing.losses["load_balancing_loss"].item(),
        part.item(),
        weighted,
    )


# ---- told


def tell_tasks(row: Row) -> None:
    """Ten tasks in a row for one favourite."""
    tasks = row.tasks
    backup = BACKUP[POETRY]
    joined = next(n for n, task in enumerate(tasks, 1) if backup in task.served_by)
    heading(9, f"Ten tasks in a row for one favourite: {EXPERTS[POETRY]}")
    print(
        "The same sentence ten times. After each, usage moves a tenth of the way to that task's\n"
        "slots, and the gate takes a step (SGD, learning rate "
        f"{LEARNING_RATE:g}) down lambda N sum f P, with\nf = usage. lambda is "
        f"{BALANCE_WEIGHT}, but the learning rate is large and usage quick (the library's\n"
        "own remembers a hundred steps), or ten tasks would show little; and the task's own loss\n"
        "is left out, so that what moves is the balancing loss's work alone.\n"
        f"its term = 8 f_{POETRY} P_{POETRY}, the favourite's part of the sum; at work: the "
        "experts that serve it"
    )
    table(
        ("task", "usage", "N sum f P", "its term", "x lambda", "p", "w", "1 - usage", "at work"),
        [
            (
                str(n),
                f"{task.usage[POETRY]:.3f}",
                f"{task.loss:.4f}",
                f"{task.part:.4f}",
                f"{task.weighted:.5f}",
                f"{task.probabilities[POETRY]:.2%}",
                f"{task.weight:.4f}",
                f"{1 - task.usage[POETRY]:.3f}",
                " ".join(map(str, task.served_by)),
            )
            for n, task in enumerate(tasks, 1)
        ],
    )
    last = tasks[-1]
    before = tasks[joined - 2]
    print(
        f"The loss rises from {tasks[0].loss:.2f} to {last.loss:.2f}, for one expert is used again "
        "and again; at even use it\nis 1 whatever p is, so that the first step moves nothing. The "
        f"favourite's share falls: p from\n{tasks[0].probabilities[POETRY]:.1%} to "
        f"{last.probabilities[POETRY]:.1%}, and 1 - usage, the factor of its gradient, from "
        f"{1 - tasks[0].usage[POETRY]:.3f} to {1 - last.usage[POETRY]:.3f}.\n"
        f"Its usage is above {THRESHOLD:g}/8 for {PATIENCE} updates in a row, and from "
        f"task {joined} on its backup, {EXPERTS[backup]} ({backup}),\nworks alongside it in a "
        f"slot of its own: w falls from {before.weight:.2f} to {tasks[joined - 1].weight:.2f}. "
        f"{EXPERTS[SCIENCE].capitalize()}, the second choice,\nis used as much, but one backup "
        "joins at a time, the better choice's."
    )
