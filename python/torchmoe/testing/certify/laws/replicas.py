"""Two processes against one."""

from __future__ import annotations

import io
import os
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import current_process
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchmoe.testing.certify.copies import added
from torchmoe.testing.certify.law import ALL_OF_IT, Answer, Difference, Gap, Law, Note, differences
from torchmoe.testing.certify.subject import Subject

_PROCESSES = 2
_UNUSED = (
    "Parameters take no part in a pass, often those of idle experts, and "
    "DistributedDataParallel waits for their gradients."
)
_SEPARATE = "A process divides by its own count, or a loss is multiplied by their number."


def ask(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """DistributedDataParallel over gloo, each process with half of the tokens."""
    if getattr(current_process(), "_inheriting", False):
        # This is a process of the law's own, which a script without a main guard has led here while
        # it was imported. The process that started it says so.
        os._exit(1)
    if subject.sharing is not None:
        yield Gap(ALL_OF_IT, subject.sharing.why)
        return
    number = _PROCESSES * max(1, num_tokens // _PROCESSES)
    x = subject.tokens(number)
    whole = subject.step(subject.steady(), x, aux=0.0)
    halves = subject.parts(x, subject.incoming(whole.reading.hidden_states), _PROCESSES)
    try:
        work = pickle.dumps((subject.steady(), subject.adapter, halves, subject.seed))
    except Exception as error:
        why = f"the layer or its adapter cannot be sent to another process: {error}"
        yield Gap(ALL_OF_IT, why, could_be_asked=True)
        return
    answers = _run(work)
    if answers is None:
        why = (
            "a process ended before it answered; a script must call certify under "
            'if __name__ == "__main__", since each process imports it'
        )
        yield Gap(ALL_OF_IT, why, could_be_asked=True)
        return
    for answer in answers:
        if _is_error(answer):
            clause = "a step in two processes"
            yield Difference(clause, "DistributedDataParallel", "a step", answer, _UNUSED)
            return
    expected = _mean([whole.gradients], _PROCESSES)
    for rank, (gradients, _, _) in enumerate(answers):
        clause = f"averaged gradients of process {rank}"
        yield from differences(clause, expected, gradients, subject.tolerance, _SEPARATE)
    if whole.reading.aux_loss is not None:
        yield from _losses(subject, halves, whole.reading.aux_loss, answers)


def _losses(
    subject: Subject,
    halves: list[tuple[Tensor, Tensor]],
    loss: Tensor,
    answers: list[Any],
) -> Iterator[Answer]:
    """L_r is that of the process's own tokens, or of all; and so is the averaged gradient."""
    own = [subject.step(subject.steady(), rows, main=0.0) for rows, _ in halves]
    found = [value for _, value, _ in answers]
    parts = [step.reading.aux_loss for step in own]
    if _same(subject, found, parts):
        yield Note("aux_loss is formed from each process's own counts")
        expected = _mean([step.gradients for step in own], _PROCESSES)
    elif _same(subject, found, [loss] * _PROCESSES):
        yield Note("aux_loss is formed from the counts of all processes")
        return  # what its gradient is times the number of processes is the training loop's matter
    else:
        values = ", ".join(f"{value.item():.6g}" for value in found)
        told = ", ".join(f"{part.item():.6g}" for part in parts if part is not None)
        yield Difference(
            "aux_loss of a process",
            "aux_loss",
            f"that of its own tokens, {told}, or of all, {loss.item():.6g}",
            values,
            _SEPARATE,
        )
        return
    for rank, (_, _, gradients) in enumerate(answers):
        clause = f"averaged gradients of aux_loss, process {rank}"
        yield from differences(clause, expected, gradients, subject.tolerance, _SEPARATE)


def _same(subject: Subject, found: list[Tensor], expected: list[Tensor | None]) -> bool:
    return all(
        other is not None and bool((value - other).abs() <= subject.tolerance * other.abs())
        for value, other in zip(found, expected, strict=True)
    )


def _mean(parts: list[dict[str, Tensor | None]], number: int) -> dict[str, Tensor | None]:
    sums = added([{n: g for n, g in part.items() if n != "x"} for part in parts], 1 / number)
    return {f"d/d {name}": grad for name, grad in sums.items()}


def _run(work: bytes) -> list[Any] | None:
    """What each process found, or an error's text: the gradients of y, aux_loss, its gradients.

    None where a process ends without an answer.
    """
    from torch.multiprocessing.spawn import ProcessExitedException, spawn

    with tempfile.TemporaryDirectory() as folder:
        # One that waits for the other's gradients aborts when the other has failed and gone.
        with suppress(ProcessExitedException):
            spawn(_replica, (work, folder), nprocs=_PROCESSES)  # type: ignore[no-untyped-call]
        answers = [
            torch.load(io.BytesIO(path.read_bytes())) for path in sorted(Path(folder).glob("[0-9]"))
        ]
    return answers if len(answers) == _PROCESSES or any(map(_is_error, answers)) else None


def _is_error(answer: object) -> bool:
    return isinstance(answer, str)


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
        replicated: nn.Module = DistributedDataParallel(layer)
        x, g = halves[rank]
        answer, loss = [], None
        for main, aux in ((1.0, 0.0), (0.0, 1.0)):
            # The second forward pass tells of parameters that took no part in the first.
            layer.zero_grad(set_to_none=True)
            torch.manual_seed(seed)
            reading = adapter.read(layer, replicated(x))
            total = main * (reading.hidden_states * g).sum()
            if aux and reading.aux_loss is not None:
                loss = reading.aux_loss.detach()
                total = total + reading.aux_loss
            total.backward()
            answer.append({f"d/d {n}": p.grad for n, p in layer.named_parameters()})
    except Exception as error:
        torch.save(str(error).splitlines()[0], path)
        # A sum that the other process never joins is still under way, and taking the group down
        # around it aborts.
        os._exit(0)
    torch.save((answer[0], loss, answer[1]), path)
    distributed.destroy_process_group()


LAW = Law(
    name="replicas",
    formula="mean over processes of grad(L_r) = grad(mean of L_r)",
    means="The gradient depends on how many processes share the batch.",
    ask=ask,
    on_request=True,
    smallest=2,
)
