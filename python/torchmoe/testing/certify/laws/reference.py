"""The layer against a slow computation from its own parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchmoe.adapter import Reading
from torchmoe.testing.certify.expert_functions import expert_function, shared_function
from torchmoe.testing.certify.law import ALL_OF_IT, Answer, Difference, Gap, Law, differences
from torchmoe.testing.certify.subject import Step, Subject

_EXACT = "donot_use_mm_for_euclid_dist"


def ask(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """What the experts are given; then value, loss and every gradient, in both modes."""
    if subject.draws:
        yield from _draws_are_for_the_router(subject, num_tokens)
    told = subject.adapter.reference
    if told is None and not _explains(subject):
        why = "no formula in common use gives its output; Adapter(reference=...) tells"
        yield Gap(ALL_OF_IT, why)
        return
    for training in (True, False):
        layer = subject.fresh(training=training)
        x = subject.tokens(num_tokens)
        expected = _step(subject, layer, x)
        mode = "training" if training else "evaluation"
        clause = f"value and gradients in {mode}"
        got = subject.step(subject.fresh(training=training), x).everything
        if expected.reading.aux_loss is None:
            got = subject.step(subject.fresh(training=training), x, aux=0.0).everything
            got.pop("aux_loss")
        wanted = {name: value for name, value in expected.everything.items() if name in got}
        yield from differences(clause, wanted, got, subject.tolerance)


def _draws_are_for_the_router(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """E_i(x_t), not E_i of a noisy x_t: a row that an expert gets in training, one gets at rest."""
    x = subject.tokens(num_tokens)
    noisy, plain = (_given_to_experts(subject, training, x) for training in (True, False))
    if not len(noisy) or not len(plain):
        return
    nearest = torch.cdist(noisy, plain, compute_mode=_EXACT).amin(dim=1)
    if nearest.max() > subject.tolerance * plain.abs().max():
        yield Difference(
            "draws are for the router alone",
            "the experts' input",
            "rows as in evaluation",
            f"a row {nearest.max().item():.3g} away from all of them",
            "The router's jitter or noise changes the tokens themselves, often in place.",
        )


@torch.no_grad()
def _given_to_experts(subject: Subject, training: bool, x: Tensor) -> Tensor:
    """The rows that experts get in a pass, [n, H]; none where no module is seen to get them."""
    layer = subject.fresh(training=training)
    path = subject.adapter.experts_path(layer)
    experts = None if path is None else layer.get_submodule(path)
    modules = list(experts) if isinstance(experts, nn.ModuleList) else [experts]
    rows: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].shape[-1] == subject.hidden_size:
            rows.append(args[0].detach().flatten(0, -2))

    for module in modules:
        if module is not None:
            module.register_forward_pre_hook(keep)
    subject.call(layer, x)
    return torch.cat([x.new_empty(0, subject.hidden_size), *rows])


def _step(subject: Subject, layer: nn.Module, x: Tensor) -> Step:
    told = subject.adapter.reference
    if told is None:
        return subject.step(layer, x, call=lambda module, leaf: _plain(subject, module, leaf))
    return subject.step(
        layer, x, call=lambda module, leaf: subject.adapter.read(module, told(module, leaf))
    )


def _explains(subject: Subject) -> bool:
    """Whether the plain sum over the slots gives the layer's output."""
    layer, x = subject.fresh(), subject.tokens(5, stream=3)
    reading = subject.call(layer, x)
    if reading.indices is None or reading.weights is None:
        return False
    if expert_function(layer, subject.adapter) is None:
        return False
    plain = _plain(subject, layer, x).hidden_states
    return not any(differences("", {"y": plain}, {"y": reading.hidden_states}, subject.tolerance))


def _plain(subject: Subject, layer: nn.Module, x: Tensor) -> Reading:
    """y_t = s sum_j w_tj E_i(x_t) + shared(x_t), one slot after another."""
    reading = subject.call(layer, x)
    expert = expert_function(layer, subject.adapter)
    indices, weights = reading.indices, reading.weights
    assert expert is not None
    assert indices is not None
    assert weights is not None
    tokens = x.flatten(0, -2)
    scale = getattr(layer, "routed_scaling_factor", 1.0)
    rows = []
    for token, ids, row in zip(tokens, indices.tolist(), weights, strict=True):
        y = token.new_zeros(token.shape)
        for slot, number in enumerate(ids):
            if 0 <= number < (subject.num_experts or 0):
                y = y + scale * row[slot].to(token.dtype) * expert(number, token)
        rows.append(y)
    shared = shared_function(layer, subject.adapter)
    y = tokens.new_zeros(tokens.shape) if not rows else torch.stack(rows)
    if shared is not None:
        y = y + shared(tokens)
    return reading._replace(hidden_states=y.reshape(x.shape))


LAW = Law(
    name="reference",
    formula="y_t = sum over slots j of w_tj E_i(x_t), i the expert of slot j, and its gradients",
    means=(
        "The layer computes another function than the one it is described by: a weight is applied "
        "twice, on the wrong side or to the wrong slot."
    ),
    ask=ask,
)
