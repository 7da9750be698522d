"""What a balancing loss is for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from torchmoe.adapter import Reading
from torchmoe.testing.certify.conventions import convention
from torchmoe.testing.certify.law import ALL_OF_IT, Answer, Difference, Gap, Law, Note, differences
from torchmoe.testing.certify.subject import Subject

_CERTAIN, _HUGE = 3.0, 1e3
# An epsilon in a denominator moves a loss by less, a forgotten factor by more.
_EPSILON = 1e-4
_BLIND = (
    "The loss does not see the load: f is constant, or f and P are of different experts. One that "
    "is not for balance is told by Adapter(balances=False)."
)


def ask(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """Its gradient, its direction, its value where even, its ends, what it counts."""
    if not subject.has_loss:
        yield Gap(ALL_OF_IT, "no auxiliary loss is seen; Adapter(aux_loss=...) tells where it is")
        return
    if subject.draws and not subject.has_loss_at_rest:
        yield Gap(ALL_OF_IT, "the loss is returned in training alone, where the layer draws")
        return
    yield from _reaches_the_router(subject, num_tokens)
    yield from _is_a_mean(subject, num_tokens)
    if num_tokens > 1:
        yield from _is_a_mean(subject, 1)
    yield from _named(subject, num_tokens)
    weight = subject.adapter.router_weight(subject.fresh())
    if weight is None:
        yield Gap("even and collapsed routing", "the router has no single matrix [E, H] to set")
        return
    yield from _even(subject, num_tokens)
    yield from _points_to_idle_experts(subject, num_tokens, weight)
    yield from _finite(subject, num_tokens, weight)


def _loss(subject: Subject, layer: nn.Module, x: Tensor) -> Tensor:
    loss = subject.call(layer, x).aux_loss
    assert loss is not None
    return loss


def _reaches_the_router(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """dL/dP_i = E f_i: not 0 for the router, and 0 for the experts."""
    names = subject.names("router")
    layer, x = subject.fresh(), subject.tokens(num_tokens)
    if _evenly_loaded(subject, layer, x):
        return  # with even f the loss is constant, whatever the scores
    step = subject.step(layer, x, main=0.0)
    sizes = {
        name: 0.0 if grad is None else grad.abs().max().item()
        for name, grad in step.gradients.items()
    }
    if names and not any(sizes[name] > 0 for name in names):
        yield Difference(
            "its gradient reaches the router",
            f"d/d {names[0]}",
            "a gradient other than 0",
            "0" if step.gradients[names[0]] is not None else "None",
            "The loss is formed from counts alone, or from detached scores.",
        )


def _is_a_mean(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """L(x, x) = L(x): f and P are shares, whatever the number of tokens."""
    x = subject.tokens(num_tokens)
    once, twice = (
        subject.step(subject.steady(), tokens, main=0.0)
        for tokens in (x, torch.cat([x, x], dim=-2))
    )
    expected = {"aux_loss": once.reading.aux_loss}
    got = {"aux_loss": twice.reading.aux_loss}
    for name in subject.names("router"):
        expected[f"d/d {name}"], got[f"d/d {name}"] = once.gradients[name], twice.gradients[name]
    yield from differences(
        "the same for every token twice" + (", one token" if num_tokens == 1 else ""),
        expected,
        got,
        max(subject.tolerance, _EPSILON),
        "A sum stands where a mean over the tokens is meant, or the mean has another denominator.",
    )


def _named(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    if num_tokens < 8:
        return
    readings: list[Reading] = []
    for stream in (0, 1, 2):
        readings.append(subject.call(subject.fresh(), subject.tokens(num_tokens, stream)))
    name = convention(readings, subject.num_experts, subject.tolerance)
    if name is not None:
        yield Note(f"aux_loss is {name}")


def _even(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """P_i = 1/E: L = c sum f_i, the same for every batch, and not 0."""
    values = []
    for stream, number in ((0, num_tokens), (1, 2 * num_tokens)):
        layer = subject.steady()
        with torch.no_grad():
            _forget_router(subject, layer)
            values.append(_loss(subject, layer, subject.tokens(number, stream)).detach())
    yield from differences(
        "with even scores the same for every batch",
        {"aux_loss": values[0]},
        {"aux_loss": values[1]},
        max(subject.tolerance, _EPSILON),
        "f or P is not a share: it is multiplied by the number of tokens, or wrongly normalised.",
    )


def _forget_router(subject: Subject, layer: nn.Module) -> None:
    for name, parameter in layer.named_parameters():
        if subject.role(name) == "router":
            parameter.zero_()


def _apart(subject: Subject, weight: str) -> tuple[Tensor, Tensor] | None:
    """Tokens u_0, ..., u_{E-1} [E, H], and the router's matrix that sends each elsewhere.

    W_e = c sum_j 2^-j u_{e-j}, u orthogonal: the logits of u_t are those of u_0 moved by t experts,
    the largest that of expert t.
    """
    size = dict(subject.fresh().named_parameters())[weight].shape
    experts, hidden_size = size[0], subject.hidden_size
    if size != (experts, hidden_size) or experts > hidden_size or experts < 2:
        return None
    tokens, _ = torch.linalg.qr(subject.tokens(experts, stream=9).reshape(experts, -1).T)
    rows = tokens.T.contiguous()
    matrix = torch.stack(
        [
            torch.stack([2.0**-j * rows[(e - j) % experts] for j in range(experts)]).sum(0)
            for e in range(experts)
        ]
    )
    return rows, _CERTAIN * matrix


def _set_router(subject: Subject, layer: nn.Module, weight: str, matrix: Tensor) -> None:
    _forget_router(subject, layer)
    dict(layer.named_parameters())[weight].copy_(matrix)


def _points_to_idle_experts(subject: Subject, num_tokens: int, weight: str) -> Iterator[Answer]:
    """The same logits for one expert's sake, or for each in turn; dL/dlogits of the former."""
    if not subject.adapter.balances:
        yield Gap("crowded and idle experts", "the adapter says that the loss is not for balance")
        return
    apart = _apart(subject, weight)
    if apart is None:
        yield Gap("crowded and idle experts", "the router's matrix is not [E, H] with E <= H")
        return
    rows, matrix = apart
    rounds = max(1, num_tokens // len(rows))
    even = subject.shaped(rows.repeat(rounds, 1))
    crowded = subject.shaped(rows[:1].repeat(rounds * len(rows), 1))
    layer = subject.steady()
    with torch.no_grad():
        _set_router(subject, layer, weight, matrix)
        low, high = (_loss(subject, layer, x).item() for x in (even, crowded))
    if _evenly_loaded(subject, layer, crowded):
        yield Gap("crowded and idle experts", "as far as is seen every expert takes its share")
        return
    if not high > low * (1 + subject.tolerance) + subject.tolerance * abs(low):
        yield Difference(
            "larger where the experts are crowded",
            "aux_loss",
            f"more than {low:.6g}, its value with the same logits and an even load",
            f"{high:.6g}",
            _BLIND,
        )
    if weight not in subject.names("router"):
        return  # frozen
    grad = subject.step(layer, crowded, main=0.0).gradients[weight]
    slopes = torch.zeros(2) if grad is None else grad[[0, -1]] @ rows[0].to(grad.dtype)
    if not slopes[0] > slopes[1]:
        yield Difference(
            "points from crowded to idle experts",
            f"d/d {weight}",
            f"a larger slope for the crowded expert than {slopes[1].item():.3g} for the idle one",
            f"{slopes[0].item():.3g}",
            _BLIND,
        )


def _evenly_loaded(subject: Subject, layer: nn.Module, x: Tensor) -> bool:
    """Whether every expert takes its share, as far as is seen, as where experts choose tokens."""
    if subject.top_k is not None and subject.top_k == subject.num_experts:
        return True
    with torch.no_grad():
        indices = subject.call(layer, x).indices
    if indices is None or subject.num_experts is None:
        return subject.sharing is not None and "ranks" in subject.sharing.why
    routed = indices[(indices >= 0) & (indices < subject.num_experts)]
    counts = routed.bincount(minlength=subject.num_experts)
    return bool(counts.max() == counts.min())


def _finite(subject: Subject, num_tokens: int, weight: str) -> Iterator[Answer]:
    """At perfect balance and at total collapse value and gradients are finite."""
    apart = _apart(subject, weight)
    if apart is None:
        return
    rows, matrix = apart
    x = subject.shaped(rows[:1].repeat(num_tokens, 1))
    for place, factor in (("perfect balance", 0.0), ("total collapse", _HUGE)):
        for dtype in (subject.dtype, torch.float32):
            layer = subject.fresh(dtype=dtype)
            with torch.no_grad():
                _set_router(subject, layer, weight, factor * matrix)
            step = subject.step(layer, x.to(dtype))
            for name, value in step.everything.items():
                if value is not None and not bool(value.isfinite().all()):
                    kind = str(dtype).removeprefix("torch.")
                    yield Difference(
                        f"finite at {place}",
                        name,
                        "finite numbers",
                        f"{value[~value.isfinite()].flatten()[0].item()} in {kind}",
                        "A division by a count or a deviation that may be 0, or exp without its "
                        "maximum taken out.",
                    )


LAW = Law(
    name="balance",
    formula="L = c E sum f_i P_i: dL/df = 0, dL/dP_i = c E f_i; a mean over tokens; finite",
    means="The balancing loss has another value or gradient than the one that balances.",
    ask=ask,
)
