"""The words of the ops' arguments, as the library lists them."""

from __future__ import annotations

import pytest
import torch

import reference
from torchmoe import ops

WORDS = {
    "score_function": ops.SCORE_FUNCTIONS,
    "normalize": ops.NORMALIZES,
    "order": ops.ORDERS,
    "overflow": ops.OVERFLOWS,
    "rounding": ops.ROUNDINGS,
    "activation": ops.ACTIVATIONS,
    "priority": ops.PRIORITIES,
    "fraction_from": ops.FRACTIONS_FROM,
    "fraction_choices": ops.FRACTION_CHOICES,
    "estimator": ("exact", "straight_through"),
}


@pytest.mark.parametrize("argument", WORDS)
def test_words_come_with_a_line_each(argument: str) -> None:
    names, docs = torch.ops.torchmoe._vocabulary(argument)
    assert tuple(names) == WORDS[argument]
    assert len(set(names)) == len(names) == len(docs)
    assert all(docs)


def test_every_activation_is_of_one_kind() -> None:
    plain = tuple(torch.ops.torchmoe._vocabulary("plain activation")[0])
    assert set(plain) | set(ops.GATED_ACTIVATIONS) == set(ops.ACTIVATIONS)
    assert not set(plain) & set(ops.GATED_ACTIVATIONS)
    assert set(reference.PLAIN) == set(plain)
    assert set(reference.GATED) == set(ops.GATED_ACTIVATIONS)


def test_the_docstring_lists_the_activations() -> None:
    lines = [line.strip() for line in (ops.expert_mlp.__doc__ or "").splitlines()]
    names, docs = torch.ops.torchmoe._vocabulary("activation")
    for name, doc in zip(names, docs, strict=True):
        assert f"* `{name}`: {doc}" in lines


def test_the_message_lists_the_words() -> None:
    indices, logits = torch.zeros(3, 1, dtype=torch.int64), torch.randn(3, 2)
    listed = ", ".join(f'"{name}"' for name in ops.NORMALIZES)
    with pytest.raises(ValueError, match=f"gate_weights: normalize must be one of {listed}, got"):
        ops.gate_weights(
            logits, indices, score_function="softmax", normalize="sum", estimator="exact"
        )


def test_an_argument_that_takes_no_words() -> None:
    with pytest.raises(ValueError, match=r'^_vocabulary: argument must .*, got "colour"'):
        torch.ops.torchmoe._vocabulary("colour")


def test_every_word_is_taken() -> None:
    x, indices = torch.randn(3, 4), torch.tensor([[0], [1], [-1]])
    for activation in ops.ACTIVATIONS:
        rows = 128 if activation in ops.GATED_ACTIVATIONS else 64
        w_in, w_out = torch.randn(2, rows, 4), torch.randn(2, 4, 64)
        y = ops.expert_mlp(x, indices, torch.ones(3, 1), w_in, None, w_out, None, activation)
        assert y.isfinite().all()
        assert y[:2].any(1).all()
