"""Tests the laws on a layer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from torchmoe._checks import (
    check_at_least,
    check_choice,
    check_dtype,
    check_integer,
    check_module,
    shown,
)
from torchmoe.adapter import Adapter
from torchmoe.testing.certify.certificate import Certificate, Finding, NotAsked
from torchmoe.testing.certify.law import ALL_OF_IT, Difference, Gap, Law, Note
from torchmoe.testing.certify.laws import known_laws
from torchmoe.testing.certify.subject import NUM_TOKENS, Subject

# Findings of one clause that are told; the rest says the same again.
_TOLD = 3
_RAISES = "The layer itself raises an error where it is asked, and nothing is compared."


def certify(
    layer: nn.Module,
    *,
    inputs: Tensor | None = None,
    hidden_size: int | None = None,
    adapter: Adapter | None = None,
    laws: str | Iterable[str] = "all",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Certificate:
    """Tests whether the laws of mixture-of-experts layers hold for a layer from any library.

        certificate = certify(MyMoE(64, num_experts=8))
        print(certificate)
        assert certificate

    The layer maps [T, H] or [B, S, H] to the same shape and returns y, (y, loss), (y, logits) or a
    record of them. It is copied; its parameters, buffers, gradients, mode and the random state are
    not changed. If a law fails, it is tested again with 1, 2, 3 and so on tokens, so that a finding
    names the smallest number that shows it.

    If the layer's router learns, on purpose, from something other than the derivative, the layer
    has a method `surrogate(x)` that returns what the layer returns and whose ordinary gradient is
    the intended one.

    Hooks of modules are copied and run, those of parameters are not.

    Args:
        layer: any module, in any mode, on the CPU.
        inputs: [..., H], tokens to draw from; standard normal ones by default.
        hidden_size: H, if neither the layer nor inputs show it.
        adapter: describes the layer where it cannot be recognised.
        laws: "all", or the names of some of `known_laws`. "all" excludes laws that are tested only
            on request: "replicas", which starts two processes.
        dtype: of the copies, float64 or float32. Casts to narrower types inside the layer are
            detected, and bounds follow them.
        seed: for tokens, directions, incoming gradients and draws.

    Returns:
        The certificate, True if no law is broken and none that could be tested was left out.

    Raises:
        TypeError: an argument has another type, the layer is sharded, or nothing in its result is a
            floating-point tensor.
        ValueError: a law's name or dtype is unknown, inputs are not finite tokens, hidden_size
            cannot be found, or the adapter names what the layer does not have.
        RuntimeError: the layer takes tokens neither as [T, H] nor as [1, T, H].
    """
    check_module("certify", "layer", layer)
    if inputs is not None and not (isinstance(inputs, Tensor) and inputs.is_floating_point()):
        raise TypeError(f"certify: inputs must be a floating-point tensor, got {shown(inputs)}")
    if adapter is not None and not isinstance(adapter, Adapter):
        raise TypeError(f"certify: adapter must be an Adapter, got {shown(adapter)}")
    check_dtype("certify", dtype)
    if dtype not in (torch.float64, torch.float32):
        raise ValueError(f"certify: dtype must be torch.float64 or torch.float32, got {dtype}")
    if inputs is not None and (inputs.dim() < 2 or not inputs.numel()):
        raise ValueError(f"certify: inputs must be tokens [..., H], got shape {list(inputs.shape)}")
    if inputs is not None and not bool(inputs.isfinite().all()):
        raise ValueError("certify: inputs must be finite, got one that is not")
    check_integer("certify", "seed", seed)
    if hidden_size is not None:
        check_at_least("certify", "hidden_size", hidden_size, 1)
    asked = _chosen(laws)
    start = time.perf_counter()
    failures: list[Finding] = []
    not_asked: list[NotAsked] = []
    notes: list[str] = []
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        warnings.simplefilter("ignore")  # the layer's own, each time a copy of it runs
        subject = Subject(layer, adapter or Adapter(), inputs, hidden_size, dtype, seed)
        hooked = [name for name, p in layer.named_parameters() if p._backward_hooks]
        if hooked:
            notes.append(f"copies have no hooks of parameters, as of {hooked[0]} here")
        for law in asked:
            for answer in _ask(subject, law):
                if isinstance(answer, Finding):
                    failures.append(answer)
                elif isinstance(answer, Gap):
                    gap = NotAsked(law.name, answer.clause, answer.why, answer.could_be_asked)
                    if gap not in not_asked:
                        not_asked.append(gap)
                elif isinstance(answer, Note) and answer.text not in notes:
                    notes.append(answer.text)
    if laws == "all":
        not_asked += [
            NotAsked(law.name, ALL_OF_IT, f'on request: laws=["{law.name}"]', could_be_asked=False)
            for law in known_laws()
            if law.on_request
        ]
    return Certificate(
        layer=subject.name,
        laws=tuple(law.name for law in asked),
        formulas={law.name: law.formula for law in asked},
        failures=tuple(failures),
        not_asked=tuple(not_asked),
        notes=tuple(notes),
        seconds=time.perf_counter() - start,
    )


def _chosen(laws: str | Iterable[str]) -> list[Law]:
    if laws == "all":
        return [law for law in known_laws() if not law.on_request]
    if isinstance(laws, str) or not isinstance(laws, Iterable):
        raise TypeError(f'certify: laws must be "all" or a list of names, got {shown(laws)}')
    wanted = list(laws)
    if not wanted:
        raise ValueError('certify: laws must be "all" or names of laws, got none')
    for name in wanted:
        check_choice("certify", "laws", name, [law.name for law in known_laws()])
    return [law for law in known_laws() if law.name in wanted]


def _ask(subject: Subject, law: Law) -> Iterator[Finding | Gap | Note]:
    """What the law finds, each broken clause with the fewest tokens that break it."""
    broken, others = _answers(subject, law, NUM_TOKENS)
    yield from others
    fewest = {clause: (NUM_TOKENS, found) for clause, found in broken.items()}
    missing = set(broken)
    for number in range(1, law.smallest + 1):
        if not missing:
            break
        again, _ = _answers(subject, law, number)
        fewest |= {clause: (number, again[clause]) for clause in missing & again.keys()}
        missing -= again.keys()
    for clause, (number, found) in fewest.items():
        for answer in found[:_TOLD]:
            yield Finding(
                law=law.name,
                clause=clause,
                where=answer.where,
                expected=answer.expected,
                got=answer.got,
                meaning=answer.meaning or law.means,
                num_tokens=answer.num_tokens or number,
                smallest_input=_input(subject, answer.num_tokens or number),
            )


def _answers(
    subject: Subject, law: Law, num_tokens: int
) -> tuple[dict[str, list[Difference]], list[Gap | Note]]:
    """The differences by clause, and the other answers; an error of the layer's is a difference."""
    broken: dict[str, list[Difference]] = {}
    others: list[Gap | Note] = []
    try:
        for answer in law.ask(subject, num_tokens):
            if isinstance(answer, Difference):
                broken.setdefault(answer.clause, []).append(answer)
            else:
                others.append(answer)
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        broken["runs"] = [Difference("runs", "the layer", "no error", text[:300], _RAISES)]
    return broken, others


def _input(subject: Subject, num_tokens: int) -> str:
    x = subject.tokens(num_tokens)
    first = ", ".join(f"{value:.4g}" for value in x.flatten()[:3].tolist())
    return f"seed {subject.seed}, x {list(x.shape)} = [{first}, ...]"
