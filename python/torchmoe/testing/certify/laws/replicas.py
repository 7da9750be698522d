"""Two processes against one."""

from __future__ import annotations

import io
import os
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchmoe.testing.certify.law import ALL_OF_IT, Answer, Difference, Gap, Law, Note, differences
from torchmoe.testing.certify.subject import Subject

_PROCESSES = 2
_SEPARATE = "A process divides by its own count, or a loss is multiplied by their number."


def ask(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """DistributedDataParallel over gloo, each process with half of the tokens."""
    if subject.sharing is not None:
        yield Gap(ALL_OF_IT, subject.sharing.why)
        return
    number = _PROCESSES * max(1, num_tokens // _PROCESSES)
    x, training = subject.tokens(number), not subject.draws
    whole = subject.step(subject.fresh(training=training), x, aux=0.0)
    g = subject.incoming(whole.reading.hidden_states)
    halves = [
        (subject.shaped(rows), subject.shaped(arriving))
        for rows, arriving in zip(
            x.flatten(0, -2).chunk(_PROCESSES), g.flatten(0, -2).chunk(_PROCESSES), strict=True
        )
    ]
    try:
        work = pickle.dumps(
            (subject.fresh(training=training), subject.adapter, halves, subject.seed)
        )
    except Exception as error:
        why = f"the layer or its adapter cannot be sent to another process: {error}"
        yield Gap(ALL_OF_IT, why, could_be_asked=True)
        return
    answers = _run(work)
    for answer in answers:
        if isinstance(answer, str):
            yield Difference("a step in two processes", "DistributedDataParallel", "a step", answer)
            return
    expected = {
        f"d/d {name}": None if grad is None else grad / _PROCESSES
        for name, grad in whole.gradients.items()
        if name != "x"
    }
    for rank, (gradients, _) in enumerate(answers):
        got = {name: gradients.get(name) for name in expected}
        clause = f"averaged gradients of process {rank}"
        yield from differences(clause, expected, got, subject.tolerance, _SEPARATE)
    loss = whole.reading.aux_loss
    if loss is not None:
        mean = sum(part for _, part in answers) / _PROCESSES
        same = bool((mean - loss).abs() <= subject.tolerance * loss.abs())
        yield Note(
            "aux_loss of all tokens is the mean of the processes'"
            if same
            else "aux_loss is formed from each process's own counts"
        )


def _run(work: bytes) -> list[Any]:
    """What each process found: (gradients by name, aux_loss), or an error's text."""
    from torch.multiprocessing.spawn import spawn

    with tempfile.TemporaryDirectory() as folder:
        spawn(_replica, (work, folder), nprocs=_PROCESSES)  # type: ignore[no-untyped-call]
        return [
            torch.load(io.BytesIO((Path(folder) / str(rank)).read_bytes()))
            for rank in range(_PROCESSES)
        ]


def _replica(rank: int, work: bytes, folder: str) -> None:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    layer, adapter, halves, seed = pickle.loads(work)
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=_PROCESSES
    )
    path = os.path.join(folder, str(rank))
    try:
        torch.manual_seed(seed)
        replicated: nn.Module = DistributedDataParallel(layer)
        x, g = halves[rank]
        reading = adapter.read(layer, replicated(x))
        reading.hidden_states.backward(g)
        loss = None if reading.aux_loss is None else reading.aux_loss.detach()
        # The next forward pass tells of parameters that took no part in this one.
        replicated(x)
        gradients = {f"d/d {n}": p.grad for n, p in layer.named_parameters()}
    except Exception as error:
        torch.save(str(error).splitlines()[0], path)
        # A sum that the other process never joins is still under way, and taking the group down
        # around it aborts.
        os._exit(0)
    torch.save((gradients, loss), path)
    distributed.destroy_process_group()


LAW = Law(
    name="replicas",
    formula="mean over processes of grad(L_r) = grad(mean of L_r)",
    means="The gradient depends on how many processes share the batch.",
    ask=ask,
    on_request=True,
    smallest=2,
)
