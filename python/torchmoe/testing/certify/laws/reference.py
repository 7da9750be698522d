"""The layer against a slow computation from its own parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchmoe.adapter import Reading
from torchmoe.testing.certify.expert_functions import expert_function, shared_function
from torchmoe.testing.certify.law import ALL_OF_IT, Answer, Difference, Gap, Law, differences
from torchmoe.testing.certify.subject import Step, Subject

Weighing = Callable[[Reading, int | None], tuple[Tensor, Tensor]]

_EXACT = "donot_use_mm_for_euclid_dist"


def ask(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """What the experts are given; then value, loss and every gradient, in both modes."""
    if subject.draws:
        yield from _draws_are_for_the_router(subject, num_tokens)
    weigh = None if subject.adapter.reference is not None else _explanation(subject)
    if subject.adapter.reference is None and weigh is None:
        why = "no formula in common use gives its output; Adapter(reference=...) tells"
        yield Gap(ALL_OF_IT, why)
        return
    x = subject.tokens(num_tokens)
    for training, tokens in ((True, x), (False, x), (True, _batched(subject, num_tokens))):
        if tokens is None:
            continue
        try:
            expected = _step(subject, subject.fresh(training=training), tokens, weigh)
        except _NotReadError:
            yield Gap("a batch of sequences", "what its router decides for them is not read")
            continue
        loss = expected.reading.aux_loss is not None
        step = subject.step(subject.fresh(training=training), tokens, aux=1.0 if loss else 0.0)
        # A gradient that replaces the reference's is compared with what the layer declares.
        own = subject.surrogate is None
        got, wanted = step.everything, expected.everything if own else expected.values
        if not loss:
            wanted.pop("aux_loss")
        mode = "training" if training else "evaluation"
        kind = "" if tokens is x else ", a batch of sequences"
        clause = f"value and gradients in {mode}{kind}"
        if expected.reading.logits is not None and step.reading.logits is not None:
            wanted["logits"], got["logits"] = expected.reading.logits, step.reading.logits
        yield from differences(clause, wanted, got, subject.tolerance)


def _batched(subject: Subject, num_tokens: int) -> Tensor | None:
    """Tokens as [2, S, H], for layers that take them so."""
    if not subject.takes_batches:
        return None
    return subject.tokens(2 * num_tokens).reshape(2, num_tokens, subject.hidden_size)


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


def _step(subject: Subject, layer: nn.Module, x: Tensor, weigh: Weighing | None) -> Step:
    told = subject.adapter.reference

    def run(module: nn.Module, leaf: Tensor) -> Reading:
        if told is not None:
            return subject.adapter.read(module, told(module, leaf))
        assert weigh is not None
        return _plain(subject, module, leaf, weigh)

    return subject.step(layer, x, call=run)


def _explanation(subject: Subject) -> Weighing | None:
    """The way to weigh slots with which the plain sum gives the layer's output."""
    layer, x = subject.fresh(), subject.tokens(5, stream=3)
    if expert_function(layer, subject.adapter) is None:
        return None
    y = subject.call(layer, x).hidden_states
    # Which slots are dropped or rerouted among many tokens, the scores of a few do not tell.
    weighings = (_read, *(_BY_SCORES if subject.sharing is None else ()))
    for weigh in weighings:
        try:
            plain = _plain(subject, layer, x, weigh).hidden_states
        except _NotReadError:
            continue
        if not any(differences("", {"y": plain}, {"y": y}, subject.tolerance)):
            return weigh
    return None


class _NotReadError(Exception):
    """What a way to weigh needs was not read."""


def _read(reading: Reading, top_k: int | None) -> tuple[Tensor, Tensor]:
    if reading.indices is None or reading.weights is None:
        raise _NotReadError
    return reading.indices, reading.weights


def _scores(score: Callable[[Tensor], Tensor], normalize: bool) -> Weighing:
    def weigh(reading: Reading, top_k: int | None) -> tuple[Tensor, Tensor]:
        if reading.logits is None or top_k is None:
            raise _NotReadError
        weights, indices = score(reading.logits).topk(top_k, dim=-1)
        return indices, weights / weights.sum(-1, keepdim=True) if normalize else weights

    return weigh


#: (reading, K) -> ids and weights of the slots, [T, K] each.
_BY_SCORES: tuple[Weighing, ...] = tuple(
    _scores(score, normalize)
    for score in (lambda logits: logits.softmax(-1), torch.sigmoid)
    for normalize in (False, True)
)


def _plain(subject: Subject, layer: nn.Module, x: Tensor, weigh: Weighing) -> Reading:
    """y_t = s sum_j w_tj E_i(x_t) + shared(x_t), one slot after another."""
    reading = subject.call(layer, x)
    expert = expert_function(layer, subject.adapter)
    assert expert is not None
    indices, weights = weigh(reading, subject.top_k)
    tokens = x.flatten(0, -2)
    scale = getattr(_owner_of_experts(subject, layer), "routed_scaling_factor", 1.0)
    rows = []
    for token, ids, row in zip(tokens, indices.tolist(), weights, strict=True):
        y = token.new_zeros(token.shape)
        for slot, number in enumerate(ids):
            if 0 <= number < (subject.num_experts or 0):
                y = y + scale * row[slot].to(token.dtype) * expert(number, token)
        rows.append(y)
    shared = shared_function(layer, subject.adapter)
    total = torch.stack(rows)
    if shared is not None:
        total = total + shared(tokens)
    return reading._replace(hidden_states=total.reshape(x.shape))


def _owner_of_experts(subject: Subject, layer: nn.Module) -> nn.Module:
    """The layer, or the one inside it that has the experts."""
    path = subject.adapter.experts_path(layer) or ""
    return layer.get_submodule(path.rpartition(".")[0])


LAW = Law(
    name="reference",
    formula="y_t = sum over slots j of w_tj E_i(x_t), i the expert of slot j, and its gradients",
    means=(
        "The layer computes another function than the one it is described by: a weight is applied "
        "twice, on the wrong side or to the wrong slot."
    ),
    ask=ask,
)
