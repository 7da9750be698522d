"""What may be reordered without changing anything."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from torchmoe.testing.certify.law import Answer, Gap, Law, differences
from torchmoe.testing.certify.subject import Step, Subject

_CROSSES = "A token's output depends on the others: a softmax, a norm or a count runs over tokens."


def ask(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """Tokens where the decision is per token, experts, and the batch."""
    if subject.sharing is None:
        yield from _tokens(subject, num_tokens)
    else:
        yield Gap("tokens", subject.sharing.why)
    if subject.sharing is None or not subject.sharing.values:
        yield from _one_at_a_time(subject, num_tokens)
    yield from _experts(subject, num_tokens)
    if subject.takes_batches:
        yield from _batch(subject, max(2, num_tokens // 3))
    else:
        yield Gap("batch", "the layer takes no [B, S, H]")


def _tokens(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """y(P x) = P y(x); y(x)_t = y(x_t)."""
    x = subject.tokens(num_tokens)
    step = subject.step(subject.steady(), x)
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(subject.seed))
    g = subject.incoming(step.reading.hidden_states)
    moved = subject.step(subject.steady(), x[..., order, :], incoming=g[..., order, :].contiguous())
    yield from differences(
        "tokens in another order",
        _ordered(step, order),
        moved.everything,
        subject.tolerance,
        _CROSSES,
    )
    with torch.no_grad():
        y = step.reading.hidden_states.detach()
        rows = [
            subject.call(subject.steady(), x[..., t : t + 1, :]).hidden_states
            for t in range(num_tokens)
        ]
        alone = {"y": torch.cat(rows, dim=-2)}
        yield from differences("a token alone", alone, {"y": y}, subject.tolerance, _CROSSES)
        twice = subject.call(subject.steady(), torch.cat([x, x], dim=-2)).hidden_states
        for half in twice.chunk(2, dim=-2):
            yield from differences(
                "equal tokens have equal outputs",
                {"y": y},
                {"y": half},
                subject.tolerance,
                _CROSSES,
            )


def _one_at_a_time(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """dy_t/dx_s = 0 for t != s: at given choices tokens do not meet."""
    if num_tokens < 2 or subject.may_attach:
        return
    x = subject.tokens(num_tokens)
    for token in (0, num_tokens // 2):
        g = torch.zeros_like(x)
        g[..., token, :] = subject.incoming(x)[..., token, :]
        grad = subject.step(subject.steady(), x, incoming=g, aux=0.0).gradients["x"]
        if grad is None:
            return
        others = grad.clone()
        others[..., token, :] = 0
        yield from differences(
            "a token's gradient reaches no other token",
            {"d/d x": torch.zeros_like(grad), "size": grad},
            {"d/d x": others, "size": grad},
            subject.tolerance,
            "Two tokens share a slot, a row or a buffer.",
        )


def _ordered(step: Step, order: Tensor) -> dict[str, Tensor | None]:
    everything = dict(step.everything)
    for name in ("y", "d/d x"):
        value = everything[name]
        everything[name] = None if value is None else value[..., order, :]
    return everything


def _experts(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """Experts renumbered, with their rows of the router: nothing changes but the ids."""
    clause, experts = "experts", subject.num_experts
    if experts is None or experts < 2:
        yield Gap(clause, "the number of experts is not seen")
        return
    order = _renumbering(subject, experts)
    layer = subject.steady()
    state = layer.state_dict()
    if any(subject.renumbered(name, order) not in state for name in state):
        yield Gap(clause, "the layer holds some of the experts only")
        return
    linear = {f"{path}.weight" for path, m in layer.named_modules() if isinstance(m, nn.Linear)}
    unclear = [
        name
        for name, tensor in state.items()
        if len(subject.expert_dimensions(name, tensor)) > 1 and name not in linear
    ]
    if unclear:
        yield Gap(clause, f"which dimension of {unclear[0]} counts the experts is not seen")
        return
    moved = _renumber(subject, layer, order)
    if not {"router", "experts"} <= {subject.role(name) for name in moved}:
        yield Gap(clause, "what belongs to an expert is not seen in the router and the experts")
        return
    x = subject.tokens(num_tokens)
    # Which of them learn is a setting of the experts by number, too.
    whole = subject.steady()
    for parameter in (*whole.parameters(), *layer.parameters()):
        parameter.requires_grad_(parameter.is_floating_point())
    expected = subject.step(whole, x)
    got = subject.step(layer, x)
    gradients = dict(got.gradients)
    for name in moved:
        source = subject.renumbered(name, order)
        if source in gradients and name in gradients:
            grad = expected.gradients[source]
            dimensions = subject.expert_dimensions(name, state[name])
            if source == name and grad is not None:
                grad = grad.index_select(dimensions[0], order)
            gradients[f"expected {name}"] = grad
    wanted = {f"d/d {n}": gradients.get(f"expected {n}", g) for n, g in expected.gradients.items()}
    found = {f"d/d {n}": got.gradients[n] for n in expected.gradients}
    yield from differences(
        "experts in another order",
        expected.values | wanted,
        got.values | found,
        subject.tolerance,
        "An expert is addressed by its number where its own row is meant, as the last one by -1.",
    )


def _renumbering(subject: Subject, experts: int) -> Tensor:
    """A permutation that keeps groups of experts whole: new expert i is the old order[i]."""
    groups = 1
    for module in subject.fresh().modules():
        for name in ("num_groups", "groups", "n_group", "num_group"):
            value = getattr(module, name, None)
            if isinstance(value, int) and value > 1 and experts % value == 0:
                groups = value
    ids = torch.arange(experts).reshape(groups, -1)
    return ids.roll(1, 0).flip(1).flatten()


def _renumber(subject: Subject, layer: nn.Module, order: Tensor) -> list[str]:
    """Moves each expert's parameters and buffers; the names of those that moved."""
    state = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    moved = []
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            source = subject.renumbered(name, order)
            if source != name:
                value.copy_(state[source])
                moved.append(name)
            elif dimensions := subject.expert_dimensions(name, value):
                value.copy_(state[name].index_select(dimensions[0], order))
                moved.append(name)
    return moved


def _batch(subject: Subject, length: int) -> Iterator[Answer]:
    """Sequences in another order; [B, S, H] as [B S, H] where a decision is per token."""
    batch = 3
    x = subject.tokens(batch * length).reshape(batch, length, subject.hidden_size)
    step = subject.step(subject.steady(), x)
    g = subject.incoming(step.reading.hidden_states)
    if subject.sharing is not None and not subject.sharing.values:
        yield Gap("batch", subject.sharing.why)
        return
    if subject.adapter.per_token is not False:
        order = torch.tensor([2, 0, 1])
        moved = subject.step(subject.steady(), x[order], incoming=g[order])
        expected = dict(step.everything)
        for name in ("y", "d/d x"):
            value = expected[name]
            expected[name] = None if value is None else value[order]
        yield from differences(
            "sequences in another order", expected, moved.everything, subject.tolerance
        )
    if subject.sharing is None:
        flat = subject.step(
            subject.steady(),
            subject.shaped(x.flatten(0, 1)),
            incoming=subject.shaped(g.flatten(0, 1)),
            aux=0.0,
        )
        shaped = subject.step(subject.steady(), x, aux=0.0)
        expected = {
            name: value.reshape(x.shape) if name in ("y", "d/d x") and value is not None else value
            for name, value in flat.everything.items()
            if name == "y" or (name != "aux_loss" and not subject.may_attach)
        }
        yield from differences(
            "a batch of sequences is its tokens",
            expected,
            shaped.everything,
            subject.tolerance,
            _CROSSES,
        )


LAW = Law(
    name="symmetry",
    formula="y(P x) = P y(x); experts renumbered, parameters too: the same y; y(x)_t = y(x_t)",
    means="The result depends on an order that means nothing.",
    ask=ask,
)
