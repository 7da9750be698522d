"""The same again: runs, threads, saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from torchmoe.testing.certify.copies import buffers, one_thread
from torchmoe.testing.certify.law import Answer, Difference, Law, differences
from torchmoe.testing.certify.shared_state import same_content
from torchmoe.testing.certify.subject import Subject


def ask(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """Bit for bit where nothing but time differs."""
    x = subject.tokens(num_tokens)
    first = subject.step(subject.fresh(), x).everything
    again = subject.step(subject.fresh(), x).everything
    race = "An order is left to a hash, a race, uninitialised memory or the clock."
    yield from differences("two runs", first, again, 0.0, race)
    with one_thread():
        alone = subject.step(subject.fresh(), x).everything
    yield from differences("one thread and several", first, alone, subject.tolerance, race)
    yield from _state(subject, num_tokens)
    yield from _modes(subject, num_tokens)


def _state(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """load(save(layer)) = layer, also into a layer with other values."""
    x = subject.tokens(num_tokens)
    trained = subject.fresh()
    held = {name: id(buffer) for name, buffer in trained.named_buffers()}
    subject.step(trained, subject.tokens(num_tokens, stream=2))
    subject.update(trained)
    for name, buffer in trained.named_buffers():
        if held.get(name) != id(buffer):
            yield Difference(
                "buffers move in place",
                f"buffer {name}",
                "the same tensor after a pass",
                "another one",
                "Whoever holds the buffer, such as a state_dict or a captured graph, sees the old "
                "numbers.",
            )
    state = {name: value.clone() for name, value in trained.state_dict().items()}
    loaded = subject.fresh()
    with torch.no_grad():
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            tensor.copy_(tensor + 1 if tensor.dtype != torch.bool else ~tensor)
    loaded.load_state_dict(state)
    with torch.no_grad():
        one, two = (subject.call(layer.eval(), x) for layer in (trained, loaded))
    meaning = "Something that the output depends on is not in the state_dict."
    values = {"y": one.hidden_states}, {"y": two.hidden_states}
    yield from differences("state_dict round trip", *values, 0.0, meaning)
    yield from differences(
        "state_dict round trip",
        {f"buffer {name}": value for name, value in buffers(trained).items()},
        {f"buffer {name}": value for name, value in buffers(loaded).items()},
        0.0,
        meaning,
    )
    yield from _shared(subject, num_tokens)


def _shared(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """What a layer writes is its own."""
    x = subject.tokens(num_tokens)
    for path, name in subject.shared:
        layer = subject.fresh()
        before = copy.deepcopy(getattr(layer.get_submodule(path), name))
        subject.step(layer, x)
        if not same_content(before, getattr(layer.get_submodule(path), name)):
            yield Difference(
                "a layer's state is its own",
                f"{path}.{name}".lstrip("."),
                "an object of each layer's own",
                "the default value of an argument, which all layers change",
                "A mutable default argument: dict() belongs into the constructor.",
            )
    bystander = subject.fresh()
    before = {f"buffer {name}": value for name, value in buffers(bystander).items()}
    subject.step(subject.fresh(), x)
    after = {f"buffer {name}": value for name, value in buffers(bystander).items()}
    shared = "Layers share a tensor that each should have for itself."
    yield from differences("another layer's pass changes nothing", before, after, 0.0, shared)


def _modes(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """train() after eval() is where it was."""
    x = subject.tokens(num_tokens)
    layer = subject.fresh()
    layer.eval()
    layer.train()
    yield from differences(
        "train() after eval()",
        subject.step(subject.fresh(), x).everything,
        subject.step(layer, x).everything,
        0.0,
        "A switch of mode changes more than the mode.",
    )


LAW = Law(
    name="determinism",
    formula="run again, with one thread, saved and loaded, train() after eval(): the same",
    means="The result depends on something that is neither the input nor the state.",
    ask=ask,
    smallest=4,
)
